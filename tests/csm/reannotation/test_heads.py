import pytest
import torch

from csm.errors import InputError
from csm.reannotation.heads import check_size
from csm.reannotation.projection import Projection


def test_features_of_another_encoder_are_refused() -> None:
    check_size(torch.zeros(2, 6), 6, "lda")
    with pytest.raises(
        InputError, match="lda: it was fitted on 6 numbers for each image, the encoder gives 8: fit the annotators"
    ):
        check_size(torch.zeros(2, 8), 6, "lda")
    pair = torch.tensor([0, 1]), torch.tensor([1, 0])
    with pytest.raises(InputError, match="projection: it was fitted on 4 numbers for each image, the encoder gives 8"):
        Projection(torch.eye(4)).share(torch.zeros(2, 8), *pair, torch.zeros(2))
