"""Heads by name."""

from csm.reannotation.heads import HeadKind
from csm.reannotation.knn import fit_knn, load_knn
from csm.reannotation.lda import fit_lda, load_lda
from csm.reannotation.linear import fit_linear, load_linear
from csm.reannotation.posterior import fit_posterior, load_posterior
from csm.reannotation.projection import fit_projection, load_projection
from csm.reannotation.qda import fit_qda, load_qda
from csm.reannotation.ratio import fit_ratio, load_ratio
from csm.reannotation.zero_shot import fit_zero_shot, load_zero_shot

HEADS: dict[str, HeadKind] = {
    "ratio": HeadKind(fit_ratio, load_ratio, pair=True, encoder=False),
    "projection": HeadKind(fit_projection, load_projection, pair=True),
    "posterior": HeadKind(fit_posterior, load_posterior),
    "lda": HeadKind(fit_lda, load_lda),
    "qda": HeadKind(fit_qda, load_qda),
    "knn": HeadKind(fit_knn, load_knn),
    "linear": HeadKind(fit_linear, load_linear),
    "zero-shot": HeadKind(fit_zero_shot, load_zero_shot, encoders=("clip",)),
}
