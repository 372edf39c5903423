"""Near copies: prompts made from one template, which folds must not split.

AdvBench asks for the same thing in many wordings; a probe that has seen one of them has seen the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

from pingscope.experiments.tasks.records import Record

OVERLAP = 0.5  # shared content words over all content words of two prompts


def group_near_copies(records: Sequence[Record], overlap: float = OVERLAP) -> list[Record]:
    """Give records without a ``pair_id`` that of the near copies they chain with: content words that overlap by
    ``overlap`` (Jaccard). A record without near copies keeps none.
    """
    if not records:
        return []
    counter = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b", stop_words=list(ENGLISH_STOP_WORDS))
    texts = [f"{record.instruction}\n{record.context}" for record in records]
    try:
        words = counter.fit_transform(texts).astype(np.float32)
    except ValueError:  # stop words alone
        return list(records)
    shared = (words @ words.T).tocoo()
    size = np.asarray(words.sum(1)).ravel()
    near = shared.data >= overlap * (size[shared.row] + size[shared.col] - shared.data)
    shared.data[~near] = 0
    shared.eliminate_zeros()
    _, group = connected_components(shared, directed=False)
    first = {int(number): records[i].id for i, number in reversed(list(enumerate(group)))}
    many = np.bincount(group)[group] > 1
    return [
        record if record.pair_id or not many[i] else replace(record, pair_id=f"near-{first[int(group[i])]}")
        for i, record in enumerate(records)
    ]
