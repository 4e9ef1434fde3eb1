"""What deploy/ ships for Kubernetes, read as it lies there."""

import shutil
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = sorted(DEPLOY.rglob("kustomization.yaml"))
MANIFESTS = sorted(set((DEPLOY / "kubernetes").rglob("*.yaml")) - set(KUSTOMIZATIONS))
PROXY = "anatomynet-proxy"
KUBERNETES = "1.37"
# Debian's is older than kustomize's present rules.
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def only(kind: str, name: str = "anatomynet") -> dict[str, Any]:
    found = [d for path in MANIFESTS for d in documents(path)]
    (one,) = [d for d in found if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return one


def pod_specs() -> dict[str, dict[str, Any]]:
    return {
        "Deployment": only("Deployment")["spec"]["template"]["spec"],
        "Proxy": only("Deployment", PROXY)["spec"]["template"]["spec"],
        "InferenceService": documents(DEPLOY / "kserve.yaml")[0]["spec"]["predictor"],
    }
