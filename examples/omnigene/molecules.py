"""Molecules of the shipped data: RDKit draws them and names their functional groups."""

import functools
import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import shared
from shared import Question

from omnigene_fast.demo.model import load_texts

CUE = "\nFunctional groups: "
NOTHING = "none"
# What a caption may say, in its order: readable names of RDKit's counts of fragments.
GROUPS = {
    "benzene": "fr_benzene",
    "pyridine": "fr_pyridine",
    "acid": "fr_COO",
    "ester": "fr_ester",
    "amide": "fr_amide",
    "ketone": "fr_ketone",
    "aldehyde": "fr_aldehyde",
    "alcohol": "fr_Al_OH",
    "phenol": "fr_phenol",
    "ether": "fr_ether",
    "aniline": "fr_aniline",
    "amine": "fr_NH2",
    "nitro": "fr_nitro",
    "nitroso": "fr_nitroso",
    "nitrile": "fr_nitrile",
    "halogen": "fr_halogen",
    "thioether": "fr_sulfide",
}


@dataclass(frozen=True)
class Molecule:
    """A molecule by its canonical SMILES, with those of `GROUPS` that it has."""

    smiles: str
    groups: tuple[str, ...]

    @property
    def caption(self) -> str:
        """Its groups in the order of `GROUPS`."""
        return ", ".join(self.groups) or NOTHING

    @property
    def question(self) -> Question:
        """What is asked beside its image."""
        return Question(CUE, self.caption, "caption")


@functools.cache
def molecules() -> tuple[tuple[Molecule, ...], int]:
    """Every molecule of the data once, in its order, and how many SMILES did not parse."""
    texts = load_texts(10**6)["molecule"]
    return parsed(line.split()[0] for text in texts for line in text.splitlines() if line.strip())


def parsed(smiles: Iterable[str]) -> tuple[tuple[Molecule, ...], int]:
    """The molecules that RDKit can sanitize, without duplicates, and how many SMILES it cannot."""
    from rdkit import Chem, rdBase
    from rdkit.Chem import Fragments

    found: dict[str, Molecule] = {}
    unread = 0
    with rdBase.BlockLogs():
        for each in smiles:
            molecule = Chem.MolFromSmiles(each)
            if molecule is None:
                unread += 1
                continue
            canonical = Chem.MolToSmiles(molecule)
            groups = tuple(name for name, count in GROUPS.items() if getattr(Fragments, count)(molecule))
            found.setdefault(canonical, Molecule(canonical, groups))
    return tuple(found.values()), unread


def split_molecules(part: str) -> list[Molecule]:
    """The molecules of "train" or "test", by their canonical SMILES."""
    return [molecule for molecule in molecules()[0] if shared.by_hash(molecule.smiles) == part]


@functools.cache
def image(smiles: str, pixels: int) -> Any:
    """A square drawing as a PIL image."""
    from PIL import Image
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    drawing = rdMolDraw2D.MolDraw2DCairo(pixels, pixels)
    drawing.drawOptions().bondLineWidth = max(1.0, pixels / 100)
    rdMolDraw2D.PrepareAndDrawMolecule(drawing, Chem.MolFromSmiles(smiles))
    drawing.FinishDrawing()
    return Image.open(io.BytesIO(drawing.GetDrawingText())).convert("RGB")


def named(caption: str) -> frozenset[str]:
    """The groups that a caption names; other words count for nothing."""
    return frozenset(GROUPS) & {word.strip() for word in caption.split(",")}


def f1(said: Sequence[str], molecules: Sequence[Molecule]) -> float:
    """F1 of the groups in captions, over all molecules and groups (micro-averaged); 0 if nothing right is named."""
    pairs = [(named(caption), set(molecule.groups)) for caption, molecule in zip(said, molecules, strict=True)]
    total = sum(len(a) + len(b) for a, b in pairs)
    return 2 * sum(len(a & b) for a, b in pairs) / total if total else 0.0


def constant_caption(molecules: Sequence[Molecule]) -> str:
    """The one caption that is best for all these molecules by `f1`: their commonest groups, as many as pay."""
    common = [name for name, _ in Counter(group for each in molecules for group in each.groups).most_common()]
    captions = [", ".join(common[:n]) for n in range(1, len(common) + 1)]
    return max(captions, key=lambda caption: f1([caption] * len(molecules), molecules), default=NOTHING)


def gallery(molecules: Sequence[Molecule], said: Sequence[str]) -> Any:
    """Figure of drawings, each with what RDKit finds and what the model said."""
    shared.axes()  # matplotlib without a display
    from matplotlib import pyplot

    columns = min(3, len(molecules))
    rows = -(-len(molecules) // columns)
    size = (3.1 * columns, 3.7 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for axis, molecule, caption in zip(grid.flat, molecules, said, strict=False):
        axis.imshow(image(molecule.smiles, 320))
        lines = [f"RDKit: {molecule.caption}", f"model: {' '.join(caption.split()) or '(nothing)'}"]
        text = "\n".join(textwrap.fill(line, 38, subsequent_indent="    ") for line in lines)
        axis.set_title(text, fontsize=8.5, loc="left", y=-0.02, va="top", parse_math=False)
    return figure
