"""Fréchet distance between two sets of picture files, and between their categories."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eval.generation.findings import Finding
from eval.generation.folders import picture_files, read_picture
from eval.metrics.frechet import FeatureStatistics, frechet_distance
from eval.metrics.inception import FeatureExtractor
from eval.progress import counted

MOST_CATEGORIES = 32  # statistics of 2048 channels are 32 MiB each
READERS = 4  # threads that decode


def by_category(folder: Path) -> dict[str, list[Path]]:
    """The pictures of a folder by the folder below it that they lie in; "" for those that lie in none.

    Raises:
        BenchmarkError: there are none.
    """
    found: dict[str, list[Path]] = {}
    for path in picture_files(folder):
        parts = path.relative_to(folder).parts
        found.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    return found


def score_by_distance(
    pictures: Mapping[str, Sequence[Path]],
    references: Mapping[str, Sequence[Path]],
    extractor: FeatureExtractor,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> Finding:
    """Distance of all pictures, and of each category where both sets have the same several ones.

    Args:
        pictures: files by category.
        references: those they are compared with.
        extractor: whose features are compared.
        batch_size: pictures at a time.
        say: takes a line now and then; on a terminal a bar is drawn as well.

    Raises:
        BenchmarkError: a picture cannot be read.
        ValueError: a set has fewer than two pictures.
    """
    if set(pictures) != set(references) or not 2 <= len(pictures) <= MOST_CATEGORIES:
        pictures, references = ({"": _flat(files.values())} for files in (pictures, references))
    total = sum(len(part) for files in (pictures, references) for part in files.values())
    with counted(total, "pictures compared", say) as advance:
        drawn, real = (
            {name: _statistics(part, extractor, batch_size, advance) for name, part in files.items()}
            for files in (pictures, references)
        )
    all_drawn, all_real = _merged(extractor.dim, drawn.values()), _merged(extractor.dim, real.values())
    distance = frechet_distance(all_drawn, all_real)
    rows = [
        {
            "category": name,
            extractor.name: frechet_distance(drawn[name], real[name]) if enough else None,
            "pictures": drawn[name].count,
            "references": real[name].count,
        }
        for name in (drawn if len(drawn) > 1 else ())
        for enough in [min(drawn[name].count, real[name].count) > 1]
    ]
    few = min(all_drawn.count, all_real.count)
    return Finding(
        headline=extractor.name,
        value=distance,
        higher_is_better=False,
        figures={extractor.name: distance},
        tables={f"{extractor.name} by category": rows} if rows else {},
        notes=[_warning(few, extractor.dim)] if few <= extractor.dim else [],
        settings={
            "extractor": extractor.name,
            "extractor_fingerprint": extractor.fingerprint,
            "compared_with": all_real.count,
        },
    )


def _warning(count: int, channels: int) -> str:
    return (
        f"{count} pictures for {channels} channels: the distance is too great, and compares only with "
        "distances of as many"
    )


def _flat(parts: Iterable[Sequence[Path]]) -> list[Path]:
    return [path for part in parts for path in part]


def _statistics(
    paths: Sequence[Path], extractor: FeatureExtractor, batch_size: int, advance: Callable[[int], None]
) -> FeatureStatistics:
    statistics = FeatureStatistics(extractor.dim)
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(paths), batch_size):
            batch = list(readers.map(read_picture, paths[start : start + batch_size]))
            statistics.update(extractor(batch))
            advance(len(batch))
    return statistics


def _merged(dim: int, parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    whole = FeatureStatistics(dim)
    for part in parts:
        whole.merge(part)
    return whole
