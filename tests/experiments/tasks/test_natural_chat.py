"""Chat of the natural world: splits share nothing, sentences are distinct, no form of asking gives a label away."""

from __future__ import annotations

from collections import Counter

import pytest

from pingscope.experiments.tasks.natural.chat import FORMS, chat_requests
from pingscope.experiments.tasks.natural.families import SPLITS
from pingscope.experiments.tasks.records import LABELS
from pingscope.interp.errors import UserError


def test_splits_share_no_topic_and_no_sentence() -> None:
    records = {split: chat_requests(split) for split in SPLITS}
    texts = [record.instruction for split in SPLITS for record in records[split]]
    assert len(set(texts)) == len(texts) and all(len(text) < 140 for text in texts)
    topics = [{record.category for record in records[split]} - {"everyday"} for split in SPLITS]
    assert [len(found) for found in topics] == [12, 2, 3]
    assert not topics[0] & topics[1] and not topics[2] & (topics[0] | topics[1])
    deeds = [{record.pair_id for record in records[split]} for split in SPLITS]
    assert not deeds[0] & deeds[1] and not deeds[2] & (deeds[0] | deeds[1])


@pytest.mark.parametrize("split", SPLITS)
def test_every_label_asks_in_every_form(split: str) -> None:
    records = chat_requests(split)
    for label in LABELS:
        own = [record for record in records if record.label == label]
        forms = Counter(form for record in own for form in FORMS if record.instruction.startswith(form.split("{")[0]))
        assert len(forms) >= 8 and max(forms.values()) < 0.35 * len(own), (split, label, forms)


def test_the_same_seed_asks_the_same_and_too_many_are_refused() -> None:
    assert chat_requests("test", 20, 3) == chat_requests("test", 20, 3) != chat_requests("test", 20, 4)
    assert Counter(record.label for record in chat_requests("train", 50)) == dict.fromkeys(LABELS, 50)
    with pytest.raises(UserError, match="there are"):
        chat_requests("validation", 100_000)
    with pytest.raises(UserError, match="unknown split"):
        chat_requests("dev")
