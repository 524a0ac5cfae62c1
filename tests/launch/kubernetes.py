"""Reads the manifests as a cluster would: strictly, and down to each pod's environment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent.parent.parent / "launch" / "k8s"
_INDEX = "batch.kubernetes.io/job-completion-index"

# The fields of a JobSet (jobset.x-k8s.io/v1alpha2): name -> None for any value, a type, a set of
# the values allowed, or the fields below. Its pods' templates are Jobs and are checked as such.
JOBSET: dict[str, Any] = {
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "failurePolicy": {
        "maxRestarts": int,
        "restartStrategy": {"Recreate", "BlockingRecreate"},
        "rules": [
            {
                "name": str,
                "action": {
                    "FailJobSet",
                    "RestartJobSet",
                    "RestartJobSetAndIgnoreMaxRestarts",
                },
                "onJobFailureReasons": [
                    {
                        "BackoffLimitExceeded",
                        "DeadlineExceeded",
                        "FailedIndexes",
                        "MaxFailedIndexesExceeded",
                        "PodFailurePolicy",
                    }
                ],
                "targetReplicatedJobs": [str],
            }
        ],
    },
    "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
    "startupPolicy": {"startupPolicyOrder": {"AnyOrder", "InOrder"}},
    "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
    "managedBy": str,
    "replicatedJobs": [
        {"name": str, "replicas": int, "template": {"metadata": None, "spec": None}}
    ],
}


def documents(name: str) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def check_fields(value: Any, allowed: Any, path: str) -> None:
    """Raises ValueError for a field, a type or a value that `allowed` does not have."""
    if isinstance(allowed, dict):
        for key, inner in value.items():
            if key not in allowed:
                raise ValueError(f"{path}.{key} is unknown; there are {', '.join(allowed)}")
            check_fields(inner, allowed[key], f"{path}.{key}")
    elif isinstance(allowed, list):
        for position, inner in enumerate(value):
            check_fields(inner, allowed[0], f"{path}[{position}]")
    elif isinstance(allowed, set) and value not in allowed:
        raise ValueError(f"{path}={value!r} is not one of {sorted(allowed)}")
    elif isinstance(allowed, type) and type(value) is not allowed:
        raise ValueError(f"{path}={value!r} is no {allowed.__name__}")


def jobs(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, subdomain, spec) of each Job that an object makes."""
    spec, name = document["spec"], document["metadata"]["name"]
    if document["kind"] == "Job":
        yield name, spec["template"]["spec"].get("subdomain", ""), spec
    elif document["kind"] == "JobSet":
        for replicated in spec["replicatedJobs"]:
            for number in range(replicated.get("replicas", 1)):
                subdomain = spec.get("network", {}).get("subdomain", name)
                yield (
                    f"{name}-{replicated['name']}-{number}",
                    subdomain,
                    replicated["template"]["spec"],
                )


@dataclasses.dataclass(frozen=True)
class Pod:
    """What a container is started with."""

    host: str
    command: list[str]
    environ: dict[str, str]


def pods(document: Mapping[str, Any]) -> list[Pod]:
    """The pods of a Job or JobSet with the environment that Kubernetes gives them."""
    return [
        Pod(f"{name}-{index}.{subdomain}", _command(spec), _environ(spec, index))
        for name, subdomain, spec in jobs(document)
        for index in range(spec["completions"])
    ]


def _container(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    (container,) = spec["template"]["spec"]["containers"]
    return container


def _command(spec: Mapping[str, Any]) -> list[str]:
    return [*_container(spec)["command"], *_container(spec).get("args", [])]


def _environ(spec: Mapping[str, Any], index: int) -> dict[str, str]:
    environ = {"JOB_COMPLETION_INDEX": str(index)}
    annotations = {_INDEX: str(index)}
    for entry in _container(spec).get("env", []):
        if "value" in entry:
            expanded = re.sub(
                r"\$\((\w+)\)", lambda m: environ.get(m[1], m[0]), str(entry["value"])
            )
            environ[entry["name"]] = expanded
        else:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            match = re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)
            assert match, path
            environ[entry["name"]] = annotations[match[1]]  # KeyError: no pod has it
    return environ
