"""What no model can be made of is refused in one line that says what is right."""

import pytest

from model.config import GCAConfig, LandmarkConfig
from model.gca_stream import GCAStream
from model.landmark_stream import LandmarkStream
from model.stream import Stream


@pytest.mark.parametrize("family", [GCAConfig, LandmarkConfig])
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"heads": "2"}, "heads must be a whole number, not '2'"),
        ({"width": 130, "heads": 4}, r"width 130 must be a multiple of twice the heads \(4\)"),
        ({"top_k": True}, "top_k must be a whole number, not True"),
        ({"segment": 1.5}, "segment must be a whole number, not 1.5"),
        ({"segment": 5}, "segment 5 must divide the block size"),
        ({"rope_base": "a"}, "rope_base must be a number above 0, not 'a'"),
        ({"rope_base": 0}, "rope_base must be a number above 0, not 0"),
        ({"rope_base": float("nan")}, "rope_base must be a number above 0, not nan"),
        ({"grams": 3}, "grams must be a list of whole numbers, not 3"),
        ({"grams": [1.5]}, r"grams must be a list of whole numbers, not \[1.5\]"),
        ({"grams": [0]}, "each of grams must be at least 1, not 0"),
        ({"family": 3}, "model family 3"),
    ],
    ids=str,
)
def test_what_no_model_can_be_made_of_is_refused(family, sizes, words) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        family(**sizes)


@pytest.mark.parametrize("layers", [5, "", "lrx"])
def test_layers_are_letters(layers) -> None:
    with pytest.raises(ValueError, match=rf"^layers {layers!r} must be letters l \(local\)"):
        LandmarkConfig(layers=layers)


def test_keys_of_the_bytes_before_need_some() -> None:
    with pytest.raises(ValueError, match="reach must be at least 2 where lag is 0"):
        GCAConfig(reach=1, lag=0)
    assert GCAConfig(reach=1, lag=1).reach == 1


@pytest.mark.parametrize(
    ("stream", "config"), [(LandmarkStream, LandmarkConfig()), (GCAStream, GCAConfig())]
)
def test_no_blocks_to_find_are_not_the_usual_number(
    stream: type[Stream], config: LandmarkConfig | GCAConfig
) -> None:
    assert stream.retrieval_of(config, 0).top_k == 0
    assert stream.retrieval_of(config).top_k == config.top_k > 0
