from argparse import Namespace

from cwcl_jax.benchmarks import formats
from cwcl_jax.data.sources import open_source


def test_every_format_holds_the_same_and_is_measured(tmp_path):
    lines = formats.write_formats(tmp_path, count=24, distinct=5)
    tars, *others = (open_source(line) for line in lines.values())
    for source in others:
        assert len(source) == 24
        for index in (0, 7, 23):
            theirs, ours = source[index], tars[index]
            assert (theirs["image"], theirs["text"]) == (ours["image"], ours["text"])
    options = Namespace(seconds=0.02, rounds=1, batch=4)
    some = {what: lines[what] for what in list(lines)[:1] + list(lines)[-1:]}
    for rows in formats.measure(some, options, 1).values():
        assert [row["source"] for row in rows] == list(some)
        assert all(row["per_second"] > 0 and row["cpu_ms"] > 0 for row in rows)
