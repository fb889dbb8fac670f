"""The forms of the router (gate.py), each forced by its tile, so that small tests meet all of them."""

from triton import next_power_of_2

from omnigene_fast.kernels import gate
from omnigene_fast.kernels.tiles import RouteTile

FORMS = {
    "token": lambda H: RouteTile(1, 4, next_power_of_2(H), 8, 1),
    "tile": lambda H: RouteTile(16, 16, 32, 8, 2),
    "two launches": lambda H: RouteTile(64, 32, 32, 8, 2, select=False),
}


def force(monkeypatch, form: str) -> None:
    """Let the launcher choose `form` whatever the sizes; products of float32 do not go to torch's GEMM."""
    monkeypatch.setattr(gate, "route_tile", lambda T, E, H, *rest: FORMS[form](H))
    monkeypatch.setattr(gate, "GEMM_FROM", 1 << 30)
