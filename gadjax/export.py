"""A trained student, or discriminator, as a Hugging Face folder."""

import json
from pathlib import Path

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.card import FILE, model_card
from gadjax.checkpointing import checkpoint_digest
from gadjax.config import stage_of
from gadjax.errors import UserError
from gadjax.files import replace_file
from gadjax.models.checkpoint import family_of, save, tokenizer_files
from gadjax.origins import discriminator_dims
from gadjax.session import Session
from gadjax.sharding import agreed, is_first
from gadjax.text import Text

ORIGIN = "gadjax.json"  # in an exported folder: what it was made from


def export_stage(session: Session, name: str, dtype: str | None = None) -> Path:
    """Writes the student of stage `name` to the run's `export/<stage>` and returns the folder; one of this checkpoint is kept.

    `dtype` is that of the written weights, "float32" or "bfloat16"; by default the one that the run computes in.

    Raises:
        UserError: the stage is not trained yet.
    """
    tokens = {"eos_token_id": session.text.end_of_turn, "pad_token_id": session.text.pad}
    return _export(session, name, "student", session.run.folder / "export" / name, tokens, tokenizer_files(session.folder), dtype)


def export_discriminator(session: Session, name: str, dtype: str | None = None) -> Path:
    """Writes the discriminator of stage `name` to `export/<stage>-discriminator` and returns the folder; one of this checkpoint is kept.

    It is a sequence classifier. Its one logit is D(x, y) for the ids of a rendered prompt and a response that ends, if it is whole,
    with the end of turn and nothing after it; a batch may be padded on either side.

    Raises:
        UserError: the stage has no discriminator or is not trained yet.
    """
    if not isinstance(session.run.config.stages[stage_of(name)], SamplingStageConfig):
        raise UserError(f"stages.{name}", "has no discriminator", "name a stage of algorithm warmup or gad")
    pad, files = with_padding(session.text, tokenizer_files(session.folder))
    tokens = {"eos_token_id": session.text.end_of_turn, "pad_token_id": pad}
    return _export(session, name, "discriminator", session.run.folder / "export" / f"{name}-discriminator", tokens, files, dtype)


def _export(
    session: Session, name: str, role: str, folder: Path, tokens: dict[str, int], files: dict[str, bytes], dtype: str | None
) -> Path:
    snapshot, dtype = session.snapshot, dtype or session.run.config.student.compute_dtype
    facts = {"training groups": len(snapshot.train), "held-out groups": len(snapshot.validation), "SHA-256": snapshot.digest}
    card = model_card(session.run.folder, session.run.config, name, role, facts)
    digest = checkpoint_digest(session.run.checkpoints(name), session.final_step(name))
    origin = json.dumps({"stage": name, "role": role, "checkpoint": digest, "dtype": dtype}, indent=2).encode()
    if agreed((folder / ORIGIN).is_file() and (folder / ORIGIN).read_bytes() == origin):
        if is_first() and (not (folder / FILE).is_file() or (folder / FILE).read_text(encoding="utf-8") != card):
            replace_file(folder / FILE, card)  # it was measured since
        return folder
    dims = session.dims if role == "student" else discriminator_dims(session.run.config, name, session.dims)
    save(
        folder,
        family_of(dims),
        dims,
        session.merged(name, role),
        tokens,
        files | {ORIGIN: origin, FILE: card.encode()},
        dtype=dtype,
    )
    return folder


def with_padding(text: Text, files: dict[str, bytes]) -> tuple[int, dict[str, bytes]]:
    """A padding id with which no response ends, and the tokenizer's files with that padding.

    transformers takes the score at the last token that is not padding. Where the tokenizer pads with the end of turn, or names no
    padding, the last of its control tokens does it, which in Llama 3 is a reserved one.
    """
    if text.pad != text.end_of_turn:
        return text.pad, files
    added = {token["id"]: token["content"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    pad = max(added.keys() - {text.end_of_turn})
    named = [name for name in ("tokenizer_config.json", "special_tokens_map.json") if name in files]
    return pad, files | {name: json.dumps(json.loads(files[name]) | {"pad_token": added[pad]}, indent=2).encode() for name in named}
