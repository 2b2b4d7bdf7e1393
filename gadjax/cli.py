"""The command line: `gadjax run CONFIG` and its parts.

What a command needs is loaded when it is used, so that `gadjax --help` answers at once and nothing starts jax before it must.

Exit status: 0 done; 2 a mistake of the user, told in one line; 130 interrupted by Ctrl-C, 143 by SIGTERM; 1 what may pass, told in one
line, or a fault of ours, with its traceback.
"""

import os
import pkgutil
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from gadjax.ending import ended, leave
from gadjax.stopping import ends_in_time

COMMANDS = {  # command -> "module:function"
    "run": "gadjax.run:run",
    "collect": "gadjax.collecting:collect_command",
    "import": "gadjax.collecting:import_command",
    "prepare": "gadjax.run:prepare",
    "train": "gadjax.run:train",
    "evaluate": "gadjax.run:evaluate",
    "report": "gadjax.run:report",
    "export": "gadjax.run:export",
    "compare": "gadjax.compare:compare",
    "judge": "gadjax.judging:judge",
    "doctor": "gadjax.doctor:doctor",
    "chat": "gadjax.chat:chat",
    "serve": "gadjax.serve:serve",
    "bench": "gadjax.bench:bench",
    "plan": "gadjax.plan:plan",
    "study": "gadjax.study:study",
    "toy": "gadjax.toy:toy",
}

# The TPU's compiler without a TPU: nobody is asked what machine this is, and several processes may compile.
COMPILE_ONLY = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LIBRARY_LOG_LEVEL": "3"}
COMPILE_ONLY |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}  # any: else it complains that it finds none
COMPILE_ONLY |= {"TF_CPP_MIN_LOG_LEVEL": "2"}  # errors alone: of what XLA warns about layouts the plan tells what it costs

WHOLE_GPU = ("run", "train", "study", "bench", "plan")  # the last for what `local` has

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells count

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.", exists=True, dir_okay=False)]
SomeConfig = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="The experiment's YAML file.", exists=True, dir_okay=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values that replace the file's.")]
Stage = Annotated[str, typer.Argument(metavar="RUN[/STAGE]", help="A run's folder and, if not the last, a stage.")]
BestOf = Annotated[int, typer.Option(min=1, max=64, help="Answers sampled for each that is given; the discriminator chooses.")]
PromptTokens = Annotated[int | None, typer.Option(min=8, help="The longest conversation; by default the run's longest prompt.")]
Moderation = Annotated[
    str | None,
    typer.Option(help="Judges every answer first: `run` as the run's config says, or an address.", metavar="run|ADDRESS"),
]
ResponseTokens = Annotated[int | None, typer.Option(min=1, help="The longest answer; by default the run's.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gadjax {metadata.version('gadjax')}")
        raise typer.Exit


@app.callback()
def _gadjax(
    coordinator: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Of several hosts: where process 0 is.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many processes there are.")] = None,
    process: Annotated[int | None, typer.Option(min=0, help="Which of them this is.")] = None,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Black-box on-policy distillation: an open student learns to answer like a teacher of which only the text is seen.

    On several hosts the same command runs on each of them; Cloud TPU needs no more.
    Elsewhere gadjax is told: gadjax --coordinator 10.0.0.1:8476 --processes 4 --process 0 run my.yaml

    Example: gadjax run configs/quickstart.yaml
    """
    told = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": processes, "JAX_PROCESS_ID": process}  # for `start_processes`
    os.environ.update({name: str(value) for name, value in told.items() if value is not None})


@app.command()
def run(config: Config, overrides: Overrides = None) -> None:
    """Do everything that follows, in this order; goes on where it stopped.

    Example: gadjax run configs/quickstart.yaml stages.gad.max_steps=100
    """
    _call("run", config, overrides or [])


@app.command()
def collect(
    config: Config,
    overrides: Overrides = None,
    show_status: Annotated[bool, typer.Option("--status", help="Only tell what the cache holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate the calls, tokens and dollars that are left.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many answers, drawn by lot: what --dry-run goes by.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask the teacher for the answers that are not in the cache yet.

    Example: gadjax collect configs/quickstart.yaml teacher.max_cost=5
    """
    _call("collect", config, overrides or [], show_status, dry_run, limit, as_json)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE[:SPLIT]", help="A file, a folder, or a data set's name on the hub.")],
    into: Annotated[Path, typer.Option("--into", metavar="CONFIG", help="The experiment's YAML file.", exists=True, dir_okay=False)],
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="The field of the prompt, a text or a list of messages.")] = None,
    response: Annotated[str | None, typer.Option(help="The field of the answer.")] = None,
    messages: Annotated[str | None, typer.Option(help="The field of a list of messages that ends with the answer.")] = None,
    teacher: Annotated[str, typer.Option(help="Whose answers they are: a name among the config's teachers.")] = "teacher",
    replace: Annotated[bool, typer.Option("--replace", help="Answers that are there already give way.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Take a teacher's answers that exist already into the cache; without `prompts.train`, their prompts are the run's.

    Read are JSON lines (plain, gzip, zstd), Parquet, folders of these or of the library `datasets`, and data sets of the hub.

    Example: gadjax import answers.jsonl --into configs/quickstart.yaml
    """
    _call("import", source, into, overrides or [], (prompt, response, messages), teacher, replace, as_json)


@app.command()
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Make the data that training reads of prompts and answers.

    Example: gadjax prepare configs/quickstart.yaml
    """
    _call("prepare", config, overrides or [])


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train the stages in their order, each from its last checkpoint.

    Example: gadjax train configs/quickstart.yaml stages.gad.learning_rate=5.0e-7
    """
    _call("train", config, overrides or [])


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint that is kept, too.")] = False,
) -> None:
    """Compare the untouched student and the stages on the validation prompts and the test sets.

    Example: gadjax evaluate configs/quickstart.yaml

    Example: gadjax evaluate configs/quickstart.yaml --all
    """
    _call("evaluate", config, overrides or [], every)


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Write the run's report, a page to open in a browser.

    Example: gadjax report configs/quickstart.yaml
    """
    _call("report", config, overrides or [])


@app.command()
def chat(
    stage: Stage,
    against: Annotated[str | None, typer.Option(metavar="STAGE", help="Another stage of the run, or `student`: side by side.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int | None, typer.Option(help="The same one gives the same answers.")] = None,
    best_of: BestOf = 1,
    prompt_tokens: PromptTokens = None,
    response_tokens: ResponseTokens = None,
    moderation: Moderation = None,
) -> None:
    """Talk to a stage's student in the terminal; the discriminator's score stands beside each answer.

    Example: gadjax chat runs/quickstart/gad --against seqkd
    """
    _call("chat", stage, against, temperature, seed, best_of, prompt_tokens, response_tokens, moderation)


@app.command()
def serve(
    stage: Stage,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Where to listen. Others than this machine need a token in GADJAX_TOKEN.")] = "127.0.0.1",
    slots: Annotated[int, typer.Option(min=1, help="Conversations that are answered at once.")] = 8,
    best_of: BestOf = 1,
    prompt_tokens: PromptTokens = None,
    response_tokens: ResponseTokens = None,
    moderation: Moderation = None,
) -> None:
    """Serve a stage's student behind an OpenAI-compatible endpoint.

    Example: gadjax serve runs/quickstart/gad --port 8000

    Example: gadjax serve runs/quickstart/gad --best-of 4
    """
    _call("serve", stage, port, host, slots, best_of, prompt_tokens, response_tokens, moderation)


@app.command()
def export(
    stage: Stage,
    discriminator: Annotated[bool, typer.Option("--discriminator", help="The stage's discriminator: a classifier with one label.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32 or bfloat16; by default what the run computes in.")] = None,
) -> None:
    """Write a stage's student, or its discriminator, as a Hugging Face folder.

    Example: gadjax export runs/quickstart/gad
    """
    _call("export", stage, discriminator, dtype)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folders of two or more runs that were evaluated.")],
    stage: Annotated[str | None, typer.Option(help="The stage to compare; by default the last of each run.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare several runs: one table, and one page with their settings and curves.

    Example: gadjax compare runs/quickstart runs/second --stage gad
    """
    _call("compare", runs, stage, out, as_json)


@app.command()
def judge(
    stage: Stage,
    overrides: Overrides = None,
    human: Annotated[bool, typer.Option("--human", help="People vote, on a page that only this machine can open.")] = False,
    against: Annotated[str, typer.Option(help="With --human: `teacher`, or another stage of the run.")] = "teacher",
    split: Annotated[str, typer.Option(help="With --human: `validation`, or a test set.")] = "validation",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --human: where the page is; 0 takes a free port.")] = 8010,
    results: Annotated[bool, typer.Option("--results", help="With --human: only tell what came out so far.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Let a model behind an OpenAI-compatible endpoint judge the answers of all stages; or let people judge one stage's.

    Example: gadjax judge runs/quickstart evaluation.judge.model=gpt-4o evaluation.judge.max_cost=5

    Example: gadjax judge --human runs/quickstart/gad --against seqkd
    """
    _call("judge", stage, overrides or [], (against, split, port, results) if human else None, as_json)


@app.command()
def doctor(
    config: SomeConfig = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what this machine has, and what a config would need of it.

    Example: gadjax doctor configs/quickstart.yaml
    """
    _call("doctor", config, overrides or [], as_json)


@app.command()
def bench(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[rollout|student|discriminator|step]... [KEY=VALUE]...", help="Parts, by default all.")
    ] = None,
    config: Annotated[Path, typer.Option(help="The experiment.")] = Path("configs/quickstart.yaml"),
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each part; their median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the speed of a config's parts on this machine, on made-up data.

    Example: gadjax bench rollout --config configs/quickstart.yaml
    """
    _call("bench", words or [], config, repeats, as_json)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="Chips to plan for, as v5p:2x2x4 or v5e:4x4, h100 or h100:8, or `local` for the devices at hand.")
    ] = "local",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to train on.")] = 200_000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt, for hours and prices; memory is that of the longest.")] = 100,
    response_tokens: Annotated[int, typer.Option(min=1, help="Of a response, in the mean.")] = 400,
    suggest: Annotated[bool, typer.Option("--suggest", help="Rank meshes, rows and what is kept; compile the best three.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what a config needs on a TPU or GPU, how long it takes and what it costs; needs no TPU, GPU, weights or data.

    Example: gadjax plan configs/paper/qwen2.5-7b.yaml --topology v5p:2x2x4
    """
    if topology != "local":
        os.environ.update(COMPILE_ONLY)
    _call("plan", config, overrides or [], topology, (prompts, prompt_tokens, response_tokens), suggest, as_json)


@app.command()
def study(
    config: Config,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many: 0, 1, ...")] = 3,
    baseline: Annotated[str | None, typer.Option(help="The stage to take differences from; finished runs are not run again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a config with several seeds and compare its stages over them; goes on where it stopped.

    Example: gadjax study configs/studies/frozen-discriminator.yaml --seeds 3
    """
    _call("study", config, overrides or [], seeds, baseline, as_json)


@app.command()
def toy(
    out: Annotated[Path, typer.Option(help="The folder for toy.svg, toy.csv and toy.json.", file_okay=False)] = Path("toy"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many starts.")] = 8,
    width: Annotated[float, typer.Option(min=0.3, max=3, help="Of each of the teacher's modes, which are 6 apart.")] = 0.7,
    start_width: Annotated[float, typer.Option(min=0.3, max=10, help="Of the untrained student.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Repeat the paper's toy experiment: a student with one mode, a teacher with three.

    Example: gadjax toy --seeds 32
    """
    _call("toy", out, seeds, width, start_width, as_json)


def _call(command: str, *arguments: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it tells that PyTorch, which is not needed, is missing
    # Of a GPU by default three quarters are taken, and a plan counts on all. JAX does not take the older name beside the other.
    if command in WHOLE_GPU and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.94")
    pkgutil.resolve_name(COMMANDS[command])(*arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line (the process's own by default) and exits with its status. SIGTERM ends it as Ctrl-C does.

    Raises:
        SystemExit: always, unless the command failed by a fault of ours, whose exception goes through.
    """
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        # What Ctrl-C would do here, which asyncio changes for a while; a shell's background job ignores Ctrl-C, and must end all the same.
        interrupt = signal.getsignal(signal.SIGINT)
        (interrupt if callable(interrupt) else signal.default_int_handler)(number, frame)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with ends_in_time():
            status = ended(lambda: app(arguments, prog_name="gadjax", standalone_mode=False))
    except Exception:
        leave(1, traceback.format_exc())
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status == INTERRUPTED:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        status = TERMINATED if terminated else INTERRUPTED
    if status:
        leave(status)
    sys.exit(status)
