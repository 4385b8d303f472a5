"""The finished models that a user can name."""

from pathlib import Path

from csm.calibrated import CalibratedClassifier, load_calibrated


def open_model(text: str, tracking_uri: str | None = None) -> CalibratedClassifier:
    """The model in a folder with ``model.json``, or in ``model/`` of a workspace."""
    root = Path(text)
    return load_calibrated(root if (root / "model.json").is_file() else root / "model")
