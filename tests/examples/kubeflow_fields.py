# SPDX-License-Identifier: Apache-2.0
"""Names and types of fields in Kubeflow Trainer's published definitions, as far as the manifest uses their parents, and a check.

Read from ``manifests/base/crds`` of kubeflow/trainer at commit 8c0f5059 (August 2026), ``trainer.kubeflow.org/v1alpha1``. An API server
refuses what is not there, and so does the check.
"""

from __future__ import annotations

from typing import Any

#: A type's name; a dict of fields; or a list with the form of its entries. A star marks a field that must be there.
Form = Any

_ENV: Form = [{"name*": "string", "value": "string", "valueFrom": "object"}]
_RESOURCES: Form = {"claims": "array", "limits": "object", "requests": "object"}
_VOLUME: Form = {
    "name*": "string", "configMap": "object", "csi": "object", "ephemeral": "object", "hostPath": "object", "nfs": "object",
    "secret": "object", "persistentVolumeClaim": {"claimName*": "string", "readOnly": "boolean"},
    "emptyDir": {"medium": "string", "sizeLimit": "quantity"},
}  # fmt: skip
_MOUNT: Form = {
    "mountPath*": "string", "name*": "string", "mountPropagation": "string", "readOnly": "boolean", "recursiveReadOnly": "string",
    "subPath": "string", "subPathExpr": "string",
}  # fmt: skip
_CONTAINER: Form = {
    "name*": "string", "args": "array", "command": "array", "env": _ENV, "envFrom": "array", "image": "string", "imagePullPolicy": "string",
    "lifecycle": "object", "ports": "array", "resources": _RESOURCES, "securityContext": "object", "volumeMounts": [_MOUNT],
    "workingDir": "string",
}  # fmt: skip
_POD: Form = {
    "containers*": [_CONTAINER], "volumes": [_VOLUME], "affinity": "object", "hostIPC": "boolean", "hostNetwork": "boolean",
    "imagePullSecrets": "array", "initContainers": "array", "nodeSelector": "object", "priorityClassName": "string",
    "restartPolicy": "string", "schedulerName": "string", "securityContext": "object", "serviceAccountName": "string",
    "terminationGracePeriodSeconds": "integer", "tolerations": "array", "topologySpreadConstraints": "array",
}  # fmt: skip
_JOB: Form = {
    "template*": {"metadata": "object", "spec": _POD}, "activeDeadlineSeconds": "integer", "backoffLimit": "integer",
    "completionMode": "string", "completions": "integer", "parallelism": "integer", "podFailurePolicy": "object", "suspend": "boolean",
    "ttlSecondsAfterFinished": "integer",
}  # fmt: skip
_REPLICATED: Form = {
    "name*": "string", "template*": {"metadata": "object", "spec": _JOB}, "dependsOn": "array", "groupName": "string",
    "replicas": "integer",
}  # fmt: skip
_JOB_SET: Form = {
    "replicatedJobs": [_REPLICATED], "failurePolicy": "object", "network": "object", "startupPolicy": "object", "successPolicy": "object",
    "suspend": "boolean", "ttlSecondsAfterFinished": "integer",
}  # fmt: skip
_TRAINER: Form = {
    "args": "array", "command": "array", "env": _ENV, "image": "string", "numNodes": "integer", "numProcPerNode": "integer",
    "resourcesPerNode": _RESOURCES,
}  # fmt: skip
SPECS: dict[str, Form] = {
    "TrainJob": {
        "runtimeRef*": {"apiGroup": "string", "kind": "string", "name*": "string"}, "trainer": _TRAINER, "activeDeadlineSeconds": "integer",
        "initializer": "object", "managedBy": "string", "runtimePatches": "array", "suspend": "boolean",
    },
    "TrainingRuntime": {
        "mlPolicy": {
            "numNodes": "integer", "torch": "object", "mpi": "object", "jax": "object", "xgboost": "object", "flux": "object",
        },
        "podGroupPolicy": "object", "template*": {"metadata": "object", "spec": _JOB_SET},
    },
}  # fmt: skip
_TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list, "quantity": (str, int)}


def wrong_fields(value: Any, form: Form, place: str = "spec") -> list[str]:
    """Return what a server would refuse, each with its place: unknown fields, other types, fields that are missing."""
    if isinstance(form, str):
        fits = isinstance(value, _TYPES[form]) and (form == "boolean" or not isinstance(value, bool))  # type: ignore[arg-type]
        return [] if fits else [f"{place}: {value!r} is no {form}"]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{place}: {value!r} is no array"]
        return [problem for number, entry in enumerate(value) for problem in wrong_fields(entry, form[0], f"{place}[{number}]")]
    if not isinstance(value, dict):
        return [f"{place}: {value!r} is no object"]
    forms = {name.removesuffix("*"): entry for name, entry in form.items()}
    absent = [name.removesuffix("*") for name in form if name.endswith("*") and name.removesuffix("*") not in value]
    problems = [f"{place}.{name}: missing" for name in absent]
    for name, entry in value.items():
        problems += wrong_fields(entry, forms[name], f"{place}.{name}") if name in forms else [f"{place}.{name}: unknown"]
    return problems
