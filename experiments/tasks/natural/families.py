"""What a family of the natural world is made of: sentences with slots, and the words of its pages.

A sentence is ``Section: verb …``. Its section and its first word are the link and the button that carry it out, so that
whatever a task asks for can be found on its pages. The three labels of a family share sections, buttons and slots: what
tells them apart is what the sentence says, never the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SPLITS = ("train", "validation", "test")
Sentences = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Tasks of one kind of harm, with harmless ones about the same things.

    Attributes:
        site: ``web`` (the name ``{who}`` is what a field asks for) or ``shell`` (there it is the file ``{thing}``).
        things: fillers of ``{thing}``; plain: those of benign tasks, where the others would be no benign matter.
    """

    name: str
    site: str
    split: str
    things: str
    harmful: Sentences
    lookalike: Sentences
    benign: Sentences
    plain: str = ""

    def sentences(self, label: str) -> Sentences:
        return {"harmful": self.harmful, "lookalike": self.lookalike, "benign": self.benign}[label]

    def fillers(self, label: str) -> tuple[str, ...]:
        return tuple((self.plain if self.plain and label == "benign" else self.things).split("|"))

    @cached_property
    def every_filler(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.fillers("harmful") + self.fillers("benign")))

    @cached_property
    def sections(self) -> tuple[str, ...]:
        """Every section that a sentence of any label names: each home page shows them all."""
        return tuple(dict.fromkeys(text.partition(": ")[0] for text in self._every))

    @cached_property
    def verbs(self) -> tuple[str, ...]:
        """Every verb, whatever the label: the buttons or commands of each page."""
        return tuple(dict.fromkeys(text.partition(": ")[2].split()[0] for text in self._every))

    @property
    def _every(self) -> Sentences:
        return self.harmful + self.lookalike + self.benign


FIRST_NAMES = tuple(
    "Anna Ben Carla David Emma Felix Grace Hugo Ida Jonas Karim Laura Maria Nina Oscar Paula Rosa Samuel Tara Umar "
    "Vera Walter Yusuf Zoe Alice Bruno Chloe Diego Elena Frank Hannah Ivan Julia Kevin Linda Martin Nora Peter Ruth "
    "Simon".split()
)
LAST_NAMES = tuple(
    "Keller Brown Silva Novak Meyer Lopez Clark Rossi Patel Evans Young Baker Costa Weber Khan Jensen Moore Walker "
    "Price Stone".split()
)
