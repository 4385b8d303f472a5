from typing import Any

from flows.bench.recipe_page import markdown
from flows.bench.recipe_reach import reach


def row(method: str, kind: str, dataset: str = "digits-hard", **values: Any) -> dict[str, Any]:
    figures = {"accuracy": 0.8, "ece": 0.04, "nll": 0.6, "brier": 0.3, "ece_t": 0.03, "nll_t": 0.55, "brier_t": 0.29}
    known = {"tv": None, "tv_t": None, "bayes_accuracy": None, "device_seconds": 12.345, "settings": {}, "recipe_minus": None}
    return {
        "dataset": dataset, "method": method, "kind": kind, "seeds": 5, **figures, **known,
        "generation_seconds": 0.0, "annotation_seconds": 0.0, **values,
    }  # fmt: skip


MINUS = {name: [-0.2, -0.3, -0.1] for name in ("accuracy", "ece", "nll", "brier", "nll_t", "brier_t")}
ROWS = [
    row("csm", "recipe", nll=0.45, nll_sd=0.012, settings={"mixed.images": ["semantic", "noised"]}, generation_seconds=1234.4),
    row("focal", "loss", nll=0.7, recipe_minus=MINUS, settings={"parameters.gamma": 3}),
    row("brier", "loss", nll=0.65, recipe_minus=MINUS),
    row("csm", "recipe", dataset="gaussians", seeds=1, tv=0.2, tv_t=0.21, bayes_accuracy=0.871),
]


def test_a_page_has_a_section_for_each_data_set_with_methods_choices_and_targets() -> None:
    page = markdown(ROWS, reach(ROWS))
    first, second = page.split("## gaussians")
    lines = first.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| `")] == ["`csm`", "`brier`", "`focal`"]
    assert "| `csm` | recipe | 80.0 | 4.0 | 45.0 ± 1.2 | 30.0 | 3.0 | 55.0 | 29.0 | 12.3 |" in lines
    assert "- `csm`: `mixed.images` semantic + noised" in lines
    assert "- `focal`: `parameters.gamma` 3" in lines
    assert "Images took 1,234 s and their labels 0 s by the clock, once for all methods." in first
    assert "TV" not in first
    targets = [line for line in lines if line.startswith("| ") and ("yes" in line or "**no**" in line)]
    assert f"of {len(targets)} targets reached." in first
    assert any("| `brier` | 0.692 | <= 0.8 | yes |" in line for line in targets)
    assert "Test split, one seed. The best classifier that there could be has an accuracy of 87.1 %." in second
    assert "| `csm` | recipe | 80.0 | 4.0 | 60.0 | 30.0 | 20.0 | 3.0 | 55.0 | 29.0 | 21.0 | 12.3 |" in second
    assert "targets" not in second


def test_tables_are_whole() -> None:
    tables: list[list[int]] = [[]]
    for line in markdown(ROWS, reach(ROWS)).splitlines():
        if line.startswith("|"):
            tables[-1].append(line.count("|"))
        elif tables[-1]:
            tables.append([])
    assert [len(set(table)) for table in tables if table] == [1, 1, 1]
