"""A conversation as data: what files of demonstrations are read into, and what the renderer turns into tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Speaker = Literal["system", "developer", "user", "assistant", "tool"]
SPEAKERS: tuple[str, ...] = get_args(Speaker)


@dataclass(frozen=True)
class ToolCall:
    """One call that an assistant turn makes; ``arguments`` is a JSON object as text, so that a call can be hashed."""

    name: str
    arguments: str
    id: str = ""

    def message(self) -> dict[str, Any]:
        """The call as chat templates expect it."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"type": "function", "function": function} | ({"id": self.id} if self.id else {})


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: who speaks.
        content: what is said; may be empty where ``tool_calls`` is not.
        reasoning: an assistant's thinking, apart from what it says.
        tool_calls: of an assistant.
        name, call_id: of a tool's answer: which tool, and which call it answers.
        trained: of an assistant: whether fine-tuning puts a loss on it.
    """

    role: Speaker
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""
    trained: bool = True

    def message(self) -> dict[str, Any]:
        """The turn as ``apply_chat_template`` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.message() for call in self.tool_calls]
        if self.name:
            message["name"] = self.name
        if self.call_id:
            message["tool_call_id"] = self.call_id
        return message


@dataclass(frozen=True)
class Conversation:
    """Turns in their order, and the tools on offer as a JSON list of definitions (empty text: none)."""

    id: str
    turns: tuple[Turn, ...]
    tools: str = ""
