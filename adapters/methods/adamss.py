"""AdaMSS (NeurIPS 2025) as peft has it: rows of the update in clusters, y[c_i] += B_i A_i V [x; 1].

The clusters are not saved. peft finds them again from the base's weight, bias and all: k-means over the rows of its
sketched left singular vectors. V, the right ones, is saved, and tells whether they were found from the same numbers.
"""

from __future__ import annotations

import torch

from weft.adapters.base import Base, Site
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.config_fields import ConfigFields, FieldTable, show
from weft.adapters.errors import AdapterMismatch, AdapterUnsupported
from weft.adapters.forms import SiteForms
from weft.adapters.methods import defaults
from weft.adapters.methods.common import COMMON_FIELDS, DECOMPOSED, PREFIX, method_sites, refuse_quantized, site_tensor
from weft.adapters.methods.factors import MAX_RANK, refuse_conv1d
from weft.adapters.methods.places import SEEDS
from weft.adapters.methods.psoft import sketched_svd
from weft.adapters.parts import LowRank

KMEANS_SEED = 123456789
KMEANS_STEPS = 10
TOLERANCE = 1e-2
"""Of the largest entry of V, between the saved one and the one found here: 16-bit files differ by less."""

_ALLOCATION = "of the allocation of subspaces during training"

FIELDS = COMMON_FIELDS | FieldTable(
    honoured=(
        "r",
        "num_subspaces",
        "subspace_rank",
        "random_seed",
        "target_modules",
        "layers_to_transform",
        "layers_pattern",
    ),
    ignored={
        "init_weights": "how the factors were initialised before training",
        "svd_threshold": "the ranks are those of the file",
        "use_dynamic_rank": "the ranks are those of the file",
        "use_asa": _ALLOCATION,
        "asa_target_subspaces": _ALLOCATION,
        "init_warmup": _ALLOCATION,
        "final_warmup": _ALLOCATION,
        "mask_interval": _ALLOCATION,
        "asa_importance_beta": _ALLOCATION,
        "asa_uncertainty_beta": _ALLOCATION,
        "asa_schedule_exponent": _ALLOCATION,
    },
)
"""Every field of peft 0.21.2's AdamssConfig."""


def compile_sites(checkpoint: Checkpoint, base: Base) -> dict[str, SiteForms]:
    """See ``Method.compile_sites``. V and the A of all clusters are one factor, the B of all clusters the other."""
    sites = method_sites(checkpoint, base, FIELDS, defaults.LORA)
    refuse_conv1d(sites, "AdaMSS")
    refuse_quantized(sites, base, "AdaMSS", DECOMPOSED)
    return {site.path: _site_forms(checkpoint, base, site) for site in sites}


def _site_forms(checkpoint: Checkpoint, base: Base, site: Site) -> SiteForms:
    config = checkpoint.config
    bias = base.bias(site)
    weight = base.weight(site) if bias is None else torch.cat([base.weight(site), bias[:, None]], dim=1)
    rank = min(config.integer("r", 100, low=1, high=MAX_RANK), *weight.shape)
    left, _, right = sketched_svd(weight, rank, 2, config.integer("random_seed", 0, **SEEDS))
    projection = site_tensor(checkpoint, site, "adamss_newB", (rank, weight.shape[1]))
    if float((projection - right).abs().max()) > TOLERANCE * float(right.abs().max()):
        raise AdapterUnsupported(
            f"{show(site.path)}: the clusters are not saved, and adamss_newB shows that they were found from other "
            "numbers than this base and random_seed give here",
            param="random_seed",
        )
    factors, spread = [], []
    for index, rows in enumerate(_clusters(left, config)):
        a, b = _factors(checkpoint, config, site, index, len(rows), rank)
        factors.append(a @ projection)
        spread.append(torch.zeros(site.out_features, len(a)).index_copy_(0, rows, b))
    a, b = torch.cat(factors), torch.cat(spread, dim=1)
    width = site.in_features
    return SiteForms(LowRank(a[:, :width], b), shift=None if bias is None else b @ a[:, width])


def _factors(
    checkpoint: Checkpoint, config: ConfigFields, site: Site, index: int, rows: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[rank, width]`` and B ``[rows, rank]`` of a cluster, whose rank is the file's."""
    most = min(rows, config.integer("subspace_rank", 1, low=1, high=MAX_RANK))
    name = f"{PREFIX}{site.path}.adamss_A.{index}"
    shape = checkpoint.tensors.shapes.get(name, ())
    rank = shape[0] if len(shape) == 2 and shape[0] <= most else most
    a = site_tensor(checkpoint, site, f"adamss_A.{index}", (rank, width))
    return a, site_tensor(checkpoint, site, f"adamss_B.{index}", (rows, rank))


def _clusters(left: torch.Tensor, config: ConfigFields) -> list[torch.Tensor]:
    """The rows of each cluster, int64 ascending."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise AdapterUnsupported(
            "AdaMSS needs scikit-learn to find its clusters again: pip install 'weft[adamss]'", param="peft_type"
        ) from error
    count = min(config.integer("num_subspaces", 5, low=1, high=MAX_RANK), len(left))
    means = KMeans(n_clusters=count, init="random", n_init=1, max_iter=KMEANS_STEPS, random_state=KMEANS_SEED)
    labels = torch.from_numpy(means.fit_predict(left.numpy().astype("float32"))).long()
    clusters = [torch.where(labels == index)[0] for index in range(count)]
    if not all(len(rows) for rows in clusters):
        raise AdapterMismatch(f"num_subspaces={count} leaves clusters empty", param="num_subspaces")
    return clusters
