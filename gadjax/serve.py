"""A stage's student behind an OpenAI-compatible endpoint."""

import os
import threading
from contextlib import ExitStack

from gadjax.errors import UserError
from gadjax.moderation import Moderator, moderated, moderation_of
from gadjax.prepare import student_folder
from gadjax.runs import Run
from gadjax.server import LOOPBACK, MAX_BODY, Server
from gadjax.session import Session
from gadjax.speaking import Room, scorer_of, speaker_of
from gadjax.terminal import say

TOKEN = "GADJAX_TOKEN"  # the environment variable with what clients must show as their API key


def serve(
    stage: str,
    port: int,
    host: str,
    slots: int,
    best_of: int,
    prompt_tokens: int | None,
    response_tokens: int | None,
    moderation: str | None = None,
) -> None:
    """Serves a stage's student, `RUN` or `RUN/STAGE`, until Ctrl-C.

    Raises:
        UserError: the stage is not trained, the address is taken, it is open to others without a token, or the moderation has no key.
    """
    token = os.environ.get(TOKEN) or None
    if host not in LOOPBACK and token is None:
        raise UserError("--host", f"{host} can be reached by others, and {TOKEN} is not set", f"export {TOKEN}, or leave --host out")
    run, name = Run.find(stage)
    moderator = Moderator(moderation_of(run.config.cleaning.moderation, moderation)) if moderation else None
    session = Session.open(run, student_folder(run))
    room = Room(prompt_tokens=prompt_tokens, response_tokens=response_tokens, places=slots, best_of=best_of)
    scorer = scorer_of(session, name, room) if best_of > 1 else None
    model = f"{run.folder.resolve().name}/{name}"
    with ExitStack() as stack:
        complete = stack.enter_context(speaker_of(session, name, room, scorer)).complete
        if moderator:
            complete = moderated(complete, stack.enter_context(moderator).flagged)
        server = stack.enter_context(Server(complete, model, port, MAX_BODY, host, token))
        say(f"serve: {model} at {server.address}; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("serve: ends when the answers that are under way are given")
