"""Some of the sample data's drawings as image-text shards, without rendering all 1,567."""

import json
from functools import cache
from pathlib import Path

from webdataset import TarWriter

from data_pipeline.sources.openmoji import drawings_folder, find_pictures, render


@cache
def pictures():
    return find_pictures(("en", "de", "es"))[0]


def write_drawings(folder: Path, count: int, size: int) -> Path:
    """Every so manieth drawing, and all cooks; yields shards as `dualtoken sample-data` writes them."""
    chosen = pictures()[:: len(pictures()) // count][:count]
    chosen += [one for one in pictures() if one.concept == "cook" and one not in chosen]
    folder.mkdir(parents=True)
    with TarWriter(str(folder / "shard-000000.tar"), encoder=False, mtime=0) as writer:
        for one in chosen[:count] if count < 8 else chosen:
            record = {"captions": one.captions, "concept": one.concept}
            png = render(drawings_folder() / f"{one.key}.svg", size)
            sample = {"__key__": one.key, "png": png}
            writer.write({**sample, "json": json.dumps(record, ensure_ascii=False).encode()})
    return folder
