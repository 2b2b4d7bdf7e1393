"""What the hub does not give: a mistake where it says so, and worth another try where it does not answer."""

from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from gadjax import cli, hub
from gadjax.errors import Passing, UserError
from gadjax.prepare import given_student
from gadjax.rows import read_rows


def replied(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return kind("no", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example/x")))


def absent(cause: Exception) -> LocalEntryNotFoundError:
    error = LocalEntryNotFoundError("not at hand")
    error.__cause__ = cause
    return error


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)


PASSING = [
    replied(503),
    replied(429),
    httpx2.ConnectError("no route"),
    absent(replied(500)),
    absent(httpx2.ConnectTimeout("too long")),
]
MISTAKES = [
    replied(404, RepositoryNotFoundError),
    replied(403, GatedRepoError),
    HFValidationError("no name"),
    absent(OfflineModeIsEnabled("as was asked for")),
    OSError("is no folder"),
]


@pytest.mark.parametrize("index", range(len(PASSING) + len(MISTAKES)))
def test_a_mistake_is_told_from_what_may_pass(monkeypatch: pytest.MonkeyPatch, index: int):
    failing(monkeypatch, [*PASSING, *MISTAKES][index])
    kind = Passing if index < len(PASSING) else UserError
    with pytest.raises(UserError, match=r"^student\.path: some/model is neither a folder nor a model that the hub gives \(") as raised:
        given_student("some/model")
    assert type(raised.value) is kind
    with pytest.raises(UserError, match=r"^prompts\.train: some/set is neither a file nor a folder nor a data set that the hub") as raised:
        read_rows("some/set", "prompts.train")
    assert type(raised.value) is kind


@pytest.mark.parametrize(("error", "status"), [(PASSING[0], 1), (MISTAKES[0], 2)])
def test_only_what_may_pass_is_worth_another_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception, status: int
):
    failing(monkeypatch, error)
    (tmp_path / "c.yaml").write_text("prompts: {train: some/set}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["collect", str(tmp_path / "c.yaml"), f"run.folder={tmp_path}"])
    assert ended.value.code == status
    told = capfd.readouterr().err
    assert told.startswith("gadjax: prompts.train: some/set is neither") and told.count("\n") == 1
