"""What SAM makes of template.yaml, with SAM's own translator in the environment of `make lint-aws`."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from scripts.install import TOOLS
from tests import aws_stack, cloudformation
from tests.cloudformation import ROOT, TEMPLATE

PYTHON = TOOLS / "cfn" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="`make lint-aws` has not been run here")


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    """The resources that CloudFormation would be given."""
    line = [PYTHON, ROOT / "scripts" / "sam_transform.py", TEMPLATE]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)["Resources"]
    return found


def only(resources: dict[str, Any], kind: str) -> tuple[str, Any]:
    """The one resource of a type, and its name."""
    ((name, resource),) = ((name, row) for name, row in resources.items() if row["Type"] == kind)
    return name, resource["Properties"]


def test_the_api_streams_from_the_function_s_alias(resources: dict[str, Any]) -> None:
    """The one route, and the integration that API Gateway documents for streams."""
    _, api = only(resources, "AWS::ApiGateway::RestApi")
    assert api["EndpointConfiguration"] == {"Types": ["REGIONAL"]}
    assert list(api["Body"]["paths"]) == ["/{endpoint_id}/openai/v1/{proxy+}"]
    (methods,) = api["Body"]["paths"].values()
    assert list(methods) == ["x-amazon-apigateway-any-method"]
    assert methods["x-amazon-apigateway-any-method"]["x-amazon-apigateway-integration"] == {
        "type": "aws_proxy",
        "httpMethod": "POST",
        "uri": {
            "Fn::Sub": "arn:${AWS::Partition}:apigateway:${AWS::Region}:lambda:path/2021-11-15/functions/"
            "${WorkerAlias}/response-streaming-invocations"
        },
        "responseTransferMode": "STREAM",
        "timeoutInMillis": 900000,
    }


def test_there_is_one_stage_and_it_is_throttled(resources: dict[str, Any]) -> None:
    """`/v2`, with which the URL begins; SAM's deployment makes no second one."""
    _, stage = only(resources, "AWS::ApiGateway::Stage")
    name, deployment = only(resources, "AWS::ApiGateway::Deployment")
    assert stage["StageName"] == "v2"
    assert stage["DeploymentId"] == {"Ref": name}
    assert "StageName" not in deployment
    (settings,) = stage["MethodSettings"]
    assert settings["ThrottlingRateLimit"] == {"Ref": "RequestsPerSecond"}
    assert settings["ThrottlingBurstLimit"] == {"Ref": "RequestsBurst"}
    assert settings["DataTraceEnabled"] is False


def test_everything_but_the_api_is_as_it_was_written(resources: dict[str, Any]) -> None:
    """So that what `tests.aws_stack` makes of template.yaml is what a stack would have."""
    written = cloudformation.load()["Resources"]
    kinds = {row["Type"] for name, row in written.items() if resources.get(name) != row}
    assert kinds == {"AWS::Serverless::Api"}
    assert aws_stack.MAKERS.keys() <= {row["Type"] for row in written.values()}
