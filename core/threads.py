"""How torch's own threads wait for work. Knows no torch: it has to be said before torch is loaded."""

from __future__ import annotations

from collections.abc import MutableMapping

from core.kernels.build import has_products

_SPINS = "GOMP_SPINCOUNT"  #: of GNU's OpenMP: how often a thread looks for work before it sleeps


def keep_calm(dtype: str, environ: MutableMapping[str, str]) -> None:
    """Let torch's threads sleep at once where our kernels do the work: awake, they would hold the cores of ours.

    What the user's environment says stands.

    Args:
        dtype: auto, float32, bfloat16 or int8, as it was asked for.
        environ: this process's own, and torch not loaded yet.
    """
    if dtype != "float32" and has_products() and "OMP_WAIT_POLICY" not in environ:
        environ.setdefault(_SPINS, "0")
