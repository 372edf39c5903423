"""A LoRA adapter cut to fewer directions after it was trained.

A LoRA layer reads its input through a random matrix of its rank, so a low rank sees little of a fine distinction and
learns it slowly, while what it has learnt in the end needs few directions. Training wide and cutting gives both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UNLIKE = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save")
A, B = "lora_A.weight", "lora_B.weight"


def cut_adapter(folder: Path, rank: int) -> float:
    """Replace every update of the PEFT folder by its best approximation of ``rank`` (Eckart-Young), in place.

    Returns:
        The share of the updates' squared norm that is kept, over all layers.

    Raises:
        UserError: an adapter that is no plain LoRA of one rank and scale.
    """
    from safetensors.torch import load_file, save_file

    config, tensors = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    # What would make the update of a layer another thing than lora_alpha / r times B A.
    others = [name for name in UNLIKE if config.get(name) not in (None, False, "none", {}, [])]
    plain = config.get("peft_type") == "LORA" and not others
    if not plain or not all(name.endswith((A, B)) for name in tensors):
        raise UserError(f"{folder}: only a plain LoRA adapter of one rank can be cut; leave --cut-rank out")
    scale = config["lora_alpha"] / config["r"]
    kept = whole = 0.0
    for name in [name for name in tensors if name.endswith(A)]:
        other = name.removesuffix(A) + B
        tensors[name], tensors[other], values = best_of_rank(tensors[name], tensors[other], rank)
        kept, whole = kept + float((values[:rank] ** 2).sum()), whole + float((values**2).sum())
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, config | {"r": rank, "lora_alpha": scale * rank})
    return kept / whole if whole else 1.0


def keep_share(folder: Path, share: float) -> None:
    """Scale every update of the PEFT folder, in place: a model on the line between the base (0) and the tuned (1).

    What is decided clearly survives a shorter step, while the harm to everything else falls faster (Wortsman et al.,
    arXiv 2109.01903).
    """
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, config | {"lora_alpha": share * config["lora_alpha"]})


def best_of_rank(
    a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"], rank: int
) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, "d_out k"], Float[Tensor, " r"]]:
    """The factors of the best rank-``rank`` approximation of ``b @ a``, and all its singular values.

    The product itself is never formed: of two thin factors, two small triangles hold all of it.
    """
    q_out, r_out = torch.linalg.qr(b.double())
    q_in, r_in = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r_out @ r_in.T)
    root = values[:rank].sqrt()
    low_b = q_out @ u[:, :rank] * root
    low_a = (q_in @ v[:rank].T * root).T
    return low_a.to(a.dtype).contiguous(), low_b.to(b.dtype).contiguous(), values
