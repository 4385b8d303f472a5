"""Annotators: what a frozen model says of a mixed image, in place of the ratio that went in."""

from csm.reannotation.annotator import Annotator, AnnotatorSpec, annotate
from csm.reannotation.calibration import choose, fit_calibration, held_out_shares
from csm.reannotation.calibrators import CALIBRATORS, Calibration, apply_calibration, describe
from csm.reannotation.ensemble import fit_ensemble, fit_ensemble_calibration, load_ensemble
from csm.reannotation.heads import FitInputs, HeadKind
from csm.reannotation.labels import soft_labels, sparse_labels
from csm.reannotation.registry import HEADS
from csm.reannotation.truncation import stored_classes

__all__ = [
    "CALIBRATORS", "HEADS", "Annotator", "AnnotatorSpec", "Calibration", "FitInputs", "HeadKind", "annotate", "apply_calibration",
    "choose", "describe", "fit_calibration", "fit_ensemble", "fit_ensemble_calibration", "held_out_shares", "load_ensemble",
    "soft_labels", "sparse_labels", "stored_classes",
]  # fmt: skip
