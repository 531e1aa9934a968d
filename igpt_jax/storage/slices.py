"""Tables of an array job's slices: each slice i/n has a workdir of its own in one folder."""

from collections.abc import Collection
from typing import Any

from igpt_jax.config import UserError, flat, parse, to_dict
from igpt_jax.storage import side_files
from igpt_jax.storage.paths import Path, children


def joined(folder: Path, job: str, table: str, same: Collection[str] = ()
           ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config of one slice, and the rows of TABLE.json of all n slices in `folder`.

    Raises:
      UserError: a slice is missing or not done, or there twice; or the slices differ in one of the keys `same`.
    """
    slices: dict[str, list[dict[str, Any]]] = {}
    config: dict[str, Any] = {}
    defaults = flat(to_dict(parse(job, {"job": job})))
    for child in children(folder):
        given = child.is_dir() and side_files.look(child / "config.json")
        if given and given.get("job") == job and "/" in given.get("shard", "") and (
                side_files.look(child / "result.json") or {}).get("status") == "done":
            # Not parsed, since a later version may refuse what an earlier one has written.
            mine, other = (defaults | flat(each) for each in (given, config or given))
            if differs := sorted(name for name in same if mine[name] != other[name]):
                raise UserError(f"shard=merge: {folder}: the slices differ in {', '.join(differs[:5])}. Run all with "
                                "the same settings.")
            if given["shard"] in slices:
                raise UserError(f"shard=merge: {folder}: two folders are both slice {given['shard']}. Remove one.")
            config, slices[given["shard"]] = given, side_files.look(child / f"{table}.json", list) or []
    counts = {shard.partition("/")[2] for shard in slices}
    if len(counts) != 1:
        raise UserError(f"shard=merge: the folders in {folder} hold finished slices of {len(counts)} array jobs, "
                        f"not of one. Run {job} with shard=i/n there first.")
    n = int(counts.pop())
    if missing := [f"{i}/{n}" for i in range(n) if f"{i}/{n}" not in slices]:
        raise UserError(f"shard=merge: {folder}: slices {', '.join(missing[:5])} are not done. Run them again.")
    return config, [row for rows in slices.values() for row in rows]
