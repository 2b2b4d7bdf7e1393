"""What travels on the host: prompts, the teacher's answers and token groups. Frozen, plain Python.

A *group* is the unit of work everywhere: one prompt, one teacher response, N student responses (DESIGN: the group).
"""

import hashlib
import json
from dataclasses import dataclass

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Prompt:
    """One prompt: the messages that end with the user's turn.

    Attributes:
        id: names the prompt in files and tables; the hash of the messages where the user gave none.
        messages: the conversation so far, the last message being the user's.
    """

    id: str
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, messages: list[Message] | str, id: str | None = None) -> "Prompt":
        """A prompt of messages, or of one user turn when `messages` is a string."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        canonical = json.dumps(turns, sort_keys=True, ensure_ascii=False)
        return cls(id or hashlib.sha256(canonical.encode()).hexdigest()[:16], tuple(turns))

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Answer:
    """A teacher's answer to one prompt, as text.

    Attributes:
        prompt_id: the `Prompt.id` that it answers.
        text: the answer; never empty.
        truncated: the teacher was cut off by its length limit, so the answer ends without an end of turn.
    """

    prompt_id: str
    text: str
    truncated: bool = False


@dataclass(frozen=True)
class TokenGroup:
    """The token ids of one prompt and the teacher's response to it.

    Attributes:
        prompt_id: the `Prompt.id`.
        prompt: ids of the rendered prompt, the template's assistant header included; 1 to P of them.
        teacher: ids of the teacher's response; the last one is the end-of-turn token unless it was truncated. 1 to R.
    """

    prompt_id: str
    prompt: tuple[int, ...]
    teacher: tuple[int, ...]
