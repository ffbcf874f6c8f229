"""The Fréchet distance against scipy's matrix square root and closed forms."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from eval.metrics.frechet import FeatureStatistics, frechet_distance


def statistics(features):
    found = FeatureStatistics(features.shape[1])
    found.update(torch.as_tensor(features))
    return found


def by_square_root(first, second, added=0.0):
    """As pytorch-fid and clean-fid: the trace of scipy's square root of the product."""
    difference = first.mean(0) - second.mean(0)
    one, two = (np.cov(part, rowvar=False) + added * np.eye(part.shape[1]) for part in (first, second))
    root = sqrtm(one @ two).real
    return difference @ difference + np.trace(one) + np.trace(two) - 2 * np.trace(root)


def draw(count, dim, seed):
    """Features that are correlated and, like Inception's, not negative."""
    random = np.random.default_rng(seed)
    return np.maximum(random.normal(0.3, 1, (count, dim)) @ random.normal(0, 0.4, (dim, dim)) + seed, 0)


def test_distance_equals_the_matrix_square_root():
    first, second = draw(400, 48, 0), draw(300, 48, 1)
    found = frechet_distance(statistics(first), statistics(second))
    assert found == pytest.approx(by_square_root(first, second), rel=1e-6)
    assert found == pytest.approx(frechet_distance(statistics(second), statistics(first)), rel=1e-9)


def test_fewer_pictures_than_channels():
    """The product is singular; the references add 1e-6 to the diagonals where their root then fails."""
    first, second = draw(20, 48, 0), draw(15, 48, 1)
    found = frechet_distance(statistics(first), statistics(second))
    assert found == pytest.approx(by_square_root(first, second, added=1e-10), rel=1e-4)
    assert frechet_distance(statistics(first), statistics(first)) == pytest.approx(0, abs=1e-9)


def test_diagonal_gaussians_by_hand():
    """Corners of boxes have diagonal covariances: the distance is the sum over channels of two squares."""
    corners = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T  # [8, 3]
    first, second = corners * [1, 2, 3] + [0, 0, 5], corners * [2, 2, 1] + [1, 0, 3]
    deviation = np.sqrt(8 / 7)  # of each channel, unbiased
    expected = (1 + 4) + deviation**2 * (1 + 0 + 4)
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(expected, rel=1e-12)


def test_a_channel_that_never_moves():
    features = draw(50, 6, 0)
    features[:, 2] = 0
    moved = features + np.array([0, 0, 3.0, 0, 0, 0])
    assert frechet_distance(statistics(features), statistics(moved)) == pytest.approx(9, rel=1e-9)


def test_parts_merge_to_the_whole_and_survive_a_file(tmp_path):
    features = draw(100, 16, 0)
    whole = statistics(features)
    parts = FeatureStatistics(16)
    for part in np.array_split(features, 7):
        parts.merge(statistics(part))
    np.savez(tmp_path / "s.npz", **parts.state())
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        read = FeatureStatistics.from_state(dict(arrays))
    assert read.count == whole.count == 100
    torch.testing.assert_close(read.mean, torch.from_numpy(features.mean(0)), rtol=1e-12, atol=0)
    expected = torch.from_numpy(np.cov(features, rowvar=False))
    torch.testing.assert_close(read.covariance, expected, rtol=1e-9, atol=1e-12)
    assert frechet_distance(read, whole) == pytest.approx(0, abs=1e-9)


def test_what_does_not_fit_is_refused():
    found = FeatureStatistics(4)
    with pytest.raises(ValueError, match=r"got features of shape \(2, 3\); expected \[B, 4\]"):
        found.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="features are not finite"):
        found.update(torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="statistics of 3 channels; expected 4"):
        found.merge(FeatureStatistics(3))
    found.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="statistics of 1 pictures; expected 2 or more"):
        frechet_distance(found, found)
    with pytest.raises(ValueError, match="of 4 and of 3 channels; expected features of one extractor"):
        frechet_distance(found, FeatureStatistics(3))
    state = found.state()
    with pytest.raises(ValueError, match=r"no array 'outer' among \['count', 'sum'\]"):
        FeatureStatistics.from_state({name: state[name] for name in ("count", "sum")})
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(3, 3\); expected \[C\] and \[C, C\]"):
        FeatureStatistics.from_state({**state, "outer": np.zeros((3, 3))})
