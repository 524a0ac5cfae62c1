from cwcl_jax.benchmarks.markdown import markdown


def test_cells_are_short_and_a_missing_one_is_empty():
    rows = [{"a": 0.12345, "b": 12345, "c": True}, {"a": 12345.6, "c": {"x": 1000}}]
    lines = markdown(rows, ["a", "b", "c"]).splitlines()
    assert lines[2:] == ["| 0.123 | 12,345 | True |", "| 12,346 |  | x 1,000 |"]
