"""Annotators: what a frozen model says of a mixed image, in place of the ratio that went in."""

from csm.reannotation.annotator import Annotator, AnnotatorSpec, annotate
from csm.reannotation.calibrators import Calibration, fit_calibration, soft_labels
from csm.reannotation.heads import FitInputs, HeadKind
from csm.reannotation.registry import HEADS

__all__ = [
    "HEADS", "Annotator", "AnnotatorSpec", "Calibration", "FitInputs", "HeadKind", "annotate", "fit_calibration", "soft_labels",
]  # fmt: skip
