"""template.yaml: what linters don't see, and what template and code have to agree on."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest

from handler import errors
from handler.errors import RequestError
from handler.messages import Request
from handler.platforms import lambda_answers, lambda_doors
from handler.settings import LAMBDA, TABLE, Settings
from handler.table import ENDPOINT_ID
from tests import cloudformation
from tests.aws_stack import GIVEN
from tests.cloudformation import ROOT, Resolver

TEMPLATE = cloudformation.load()
RESOURCES: Mapping[str, Any] = TEMPLATE["Resources"]
PARAMETERS: Mapping[str, Any] = TEMPLATE["Parameters"]

OTHERS = {"LD_LIBRARY_PATH"}
"""Of the function's environment, what is for others than the worker."""

KEY = {"KmsKeyArn": "arn:aws:kms:us-east-1:123456789012:key/1234"}
BOUND = {
    "EndpointId": "my-llm",
    "HfTokenSecretArn": "arn:aws:secretsmanager:us-east-1:123456789012:secret:hf-1",
}


def attribute(name: str, attribute: str | None) -> str:
    """What stands for an attribute of a resource that nobody has made."""
    match RESOURCES[name]["Type"], attribute:
        case "AWS::SQS::Queue", None:
            return f"https://sqs.us-east-1.amazonaws.com/123456789012/{name}"
        case "AWS::S3::Bucket", None:
            return name.lower()
        case _, "Arn":
            return f"arn:aws:x:::{name}"
    return f"{name}.{attribute}" if attribute else name


def resolver(**parameters: Any) -> Resolver:
    """The template with these parameters."""
    return Resolver(TEMPLATE, {**GIVEN, **parameters}, attribute, "stack")


def properties(name: str, **parameters: Any) -> Any:
    """The properties of a resource."""
    return resolver(**parameters).value(RESOURCES[name]["Properties"])


def environ(**parameters: Any) -> dict[str, str]:
    """The function's environment."""
    given: dict[str, str] = properties("Worker", **parameters)["Environment"]["Variables"]
    return {name: str(value) for name, value in given.items()}


def integration() -> Any:
    """How the API calls the function."""
    (path,) = properties("Api")["DefinitionBody"]["paths"].values()
    return path["x-amazon-apigateway-any-method"]["x-amazon-apigateway-integration"]


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters", [{}, BOUND, {**KEY, "ModelName": "s3://bucket/deep/model", "CorsOrigins": "*"}]
)
def test_the_function_has_settings_that_the_worker_takes(parameters: dict[str, str]) -> None:
    """All of them are in its table, and none is at fault."""
    given = environ(**parameters)
    known = {name for row in TABLE for name in row.names}
    assert given.keys() - known == OTHERS
    settings = Settings.from_environ({**given, LAMBDA: "127.0.0.1:9001"})
    assert settings.platform == "aws_lambda"
    assert settings.auth
    assert settings.notes == ()
    assert settings.lambda_response_mode == "stream"
    assert settings.endpoint_id == parameters.get("EndpointId", "llm")


def test_an_endpoint_id_is_one_to_template_and_worker() -> None:
    """What CloudFormation lets through, the worker does too."""
    pattern = re.compile(PARAMETERS["EndpointId"]["AllowedPattern"])
    for value in ("llm", "a", "-a", "", "a" * 64, "a" * 65, "a_b-C", "a/b", "a b"):
        try:
            taken = bool(ENDPOINT_ID.parse(value))
        except ValueError:
            taken = False
        assert bool(pattern.search(value)) is taken, value


# --- time ---------------------------------------------------------------------------------------


def test_nobody_gives_up_before_the_worker_does() -> None:
    """The worker ends an answer before Lambda's time is over, and the API waits as long as that."""
    timeout_s = properties("Worker")["Timeout"]
    assert integration()["timeoutInMillis"] == timeout_s * 1000
    assert 0 < lambda_answers.LAST_WORD_S < timeout_s / 10


def test_a_message_is_hidden_for_longer_than_it_is_worked_on() -> None:
    """Six times as long, as AWS asks of a queue that a function is behind."""
    assert properties("BatchQueue")["VisibilityTimeout"] >= 6 * properties("Worker")["Timeout"]


# --- the URL ------------------------------------------------------------------------------------


def test_the_base_url_leads_to_the_worker() -> None:
    """What the stack prints, with what a client appends, is a path that the API has and the worker knows."""
    base_url = resolver(EndpointId="my-llm").value(TEMPLATE["Outputs"]["BaseUrl"]["Value"])
    assert base_url == "https://Api.execute-api.us-east-1.amazonaws.com/v2/my-llm/openai/v1"
    stage, _, resource = urlsplit(base_url).path.removeprefix("/").partition("/")
    assert stage == properties("Api")["StageName"]
    (template,) = properties("Api")["DefinitionBody"]["paths"]
    route = re.sub(r"\{(\w+)\+\}", r"(?P<\1>.+)", template)
    route = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route)
    path = f"/{resource}/chat/completions"
    assert re.fullmatch(route, path)
    assert lambda_doors.openai_path(Request("POST", path), "my-llm") == "/v1/chat/completions"


def test_answers_stream() -> None:
    """The API passes on what the function's alias sends, as it comes."""
    found = integration()
    assert (found["type"], found["responseTransferMode"]) == ("aws_proxy", "STREAM")
    assert found["uri"] == (
        "arn:aws:apigateway:us-east-1:lambda:path/2021-11-15/functions/WorkerAlias/response-streaming-invocations"
    )


def codes() -> Iterator[tuple[int, str, str | None]]:
    """Status, type and code of each error that the worker answers with."""
    todo: list[type[RequestError]] = [errors.RequestError]
    while todo:
        kind = todo.pop()
        yield kind.status, kind.type, kind.code
        todo += kind.__subclasses__()


STATUS = {"DEFAULT_4XX": 400, "DEFAULT_5XX": 502}
"""Of answers that keep the status that they have: one whose error is meant."""


def test_what_the_api_answers_by_itself_has_the_worker_s_errors() -> None:
    """OpenAI's shape, and the same types and codes."""
    known = set(codes())
    given = properties("Api")["DefinitionBody"]["x-amazon-apigateway-gateway-responses"]
    for name, response in given.items():
        text = response["responseTemplates"]["application/json"]
        error = json.loads(text.replace("$context.error.messageString", '"as API Gateway says it"'))["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        status = int(response.get("statusCode") or STATUS[name])
        assert (status, error["type"], error["code"]) in known, name


# --- batches ------------------------------------------------------------------------------------


def test_batches_are_read_where_they_bring_a_message() -> None:
    """The prefix of the notification, of the worker and of its policy is one, and results are elsewhere."""
    given = environ()
    (told,) = properties("BatchBucket")["NotificationConfiguration"]["QueueConfigurations"]
    rules = {rule["Name"]: rule["Value"] for rule in told["Filter"]["S3Key"]["Rules"]}
    assert given["BATCH_INPUT"] == f"s3://batchbucket/{rules['prefix']}"
    assert rules["suffix"] == ".jsonl"
    assert given["BATCH_OUTPUT"] == "s3://batchbucket/out/"
    assert not given["BATCH_OUTPUT"].startswith(given["BATCH_INPUT"])
    assert told["Queue"] == attribute("BatchQueue", "Arn")
    assert given["SQS_QUEUE_URL"] == attribute("BatchQueue", None)
    allowed = {
        statement["Sid"]: statement["Resource"]
        for statement in properties("WorkerPolicy")["PolicyDocument"]["Statement"]
    }
    assert allowed["ReadBatches"] == f"arn:aws:x:::BatchBucket/{rules['prefix']}*"
    assert allowed["WriteResults"] == "arn:aws:x:::BatchBucket/out/*"
    assert allowed["WriteReplies"] == "arn:aws:x:::BatchBucket/replies/*"


def test_one_message_at_a_time_can_fail_by_itself() -> None:
    """Through the same alias as the API."""
    found = properties("BatchEvents")
    assert (found["BatchSize"], found["FunctionResponseTypes"]) == (1, ["ReportBatchItemFailures"])
    assert found["FunctionName"] == properties("ApiPermission")["FunctionName"] == "WorkerAlias"


# --- the function -------------------------------------------------------------------------------


def test_every_update_is_published() -> None:
    """The alias leads to the version that is published anew, whose environments are bounded."""
    worker, alias = properties("Worker"), properties("WorkerAlias")
    assert worker["PublishToLatestPublished"] is True
    assert alias["FunctionVersion"] == "$LATEST.PUBLISHED"
    assert worker["FunctionScalingConfig"] == {"MinExecutionEnvironments": 0, "MaxExecutionEnvironments": 2}
    assert "AWS::Lambda::Version" not in {resource["Type"] for resource in RESOURCES.values()}


@pytest.mark.parametrize(
    ("uri", "taken"),
    [
        (f"123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/firsttoken@sha256:{'a' * 64}", True),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com/firsttoken:latest", False),
        (f"docker.io/firsttoken@sha256:{'a' * 64}", False),
    ],
)
def test_an_image_is_named_by_its_digest(uri: str, taken: bool) -> None:
    """Of a tag CloudFormation would not see that it is another image now, and publish nothing."""
    assert bool(re.search(PARAMETERS["ImageUri"]["AllowedPattern"], uri)) is taken


def test_an_environment_fits_its_instance() -> None:
    """A g6.2xlarge has 8 vCPUs and 32 GiB, of which AWS keeps about one each."""
    worker = properties("Worker")
    config = worker["CapacityProviderConfig"]["LambdaManagedInstancesCapacityProviderConfig"]
    memory_gib = worker["MemorySize"] / 1024
    assert memory_gib <= 32 - 1
    assert memory_gib / config["ExecutionEnvironmentMemoryGiBPerVCpu"] <= 8 - 1
    assert "g6.2xlarge" in PARAMETERS["InstanceTypes"]["Default"].split(",")


# --- who may do what, and what is encrypted -----------------------------------------------------


def statements() -> Iterator[tuple[str, Any]]:
    """Every statement of the policies of roles, and of which resource."""
    for name, resource in RESOURCES.items():
        found = properties(name, **KEY) if resource["Type"].startswith("AWS::IAM::") else {}
        documents = [
            found.get("PolicyDocument"),
            *(row["PolicyDocument"] for row in found.get("Policies", ())),
        ]
        for document in filter(None, documents):
            yield from ((name, statement) for statement in document["Statement"])


def test_permissions_name_their_actions_and_resources() -> None:
    """None is for everything, but those of X-Ray, which has no resources."""
    for name, statement in statements():
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not [action for action in actions if "*" in action], name
        assert statement["Resource"] != "*" or {action.partition(":")[0] for action in actions} == {"xray"}


def test_roles_are_lambda_s_for_this_account() -> None:
    """Nobody else takes them, and Lambda for nobody else."""
    for name, resource in RESOURCES.items():
        if resource["Type"] == "AWS::IAM::Role":
            assert properties(name)["AssumeRolePolicyDocument"]["Statement"] == [
                {
                    "Effect": "Allow",
                    "Principal": {"Service": "lambda.amazonaws.com"},
                    "Action": "sts:AssumeRole",
                    "Condition": {"StringEquals": {"aws:SourceAccount": "123456789012"}},
                }
            ]


@pytest.mark.parametrize(("parameters", "algorithm"), [({}, "AES256"), (KEY, "aws:kms")])
def test_everything_is_encrypted(parameters: dict[str, str], algorithm: str) -> None:
    """With AWS's keys, or with the one that was given; checkov can't see it."""
    key = parameters.get("KmsKeyArn")
    for name in ("ModelBucket", "BatchBucket"):
        (rule,) = properties(name, **parameters)["BucketEncryption"]["ServerSideEncryptionConfiguration"]
        expected = {"SSEAlgorithm": algorithm, **({"KMSMasterKeyID": key} if key else {})}
        assert rule["ServerSideEncryptionByDefault"] == expected
    for name in ("BatchQueue", "BatchDlq"):
        queue = properties(name, **parameters)
        assert (queue.get("SqsManagedSseEnabled"), queue.get("KmsMasterKeyId")) == (
            None if key else True,
            key,
        )
    table = properties("StateTable", **parameters)["SSESpecification"]
    assert table == {"SSEEnabled": True, **({"SSEType": "KMS", "KMSMasterKeyId": key} if key else {})}
    for name in ("WorkerLogs", "ApiLogs", "ApiKeys"):
        assert properties(name, **parameters).get("KmsKeyId") == key


def test_the_topic_of_the_alarms_has_no_key_that_keeps_cloudwatch_out() -> None:
    """alias/aws/sns does: its policy names no service, and alarms would be lost without a word."""
    assert "KmsMasterKeyId" not in properties("AlarmTopic")
    assert properties("AlarmTopic", **KEY)["KmsMasterKeyId"] == KEY["KmsKeyArn"]


def test_buckets_take_tls_only_and_nobody_s_public_access() -> None:
    """Their policies deny the rest."""
    for name in ("ModelBucket", "BatchBucket"):
        assert set(properties(name)["PublicAccessBlockConfiguration"].values()) == {True}
        (statement,) = properties(f"{name}Policy")["PolicyDocument"]["Statement"]
        assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
        assert statement["Condition"] == {"Bool": {"aws:SecureTransport": False}}
        arn = attribute(name, "Arn")
        assert statement["Resource"] == [arn, f"{arn}/*"]


def test_the_worker_may_use_a_key_of_one_s_own() -> None:
    """And none otherwise."""
    with_key = {row["Sid"] for row in properties("WorkerPolicy", **KEY)["PolicyDocument"]["Statement"]}
    without = {row["Sid"] for row in properties("WorkerPolicy")["PolicyDocument"]["Statement"]}
    assert with_key - without == {"UseKey"}


# --- alarms, parameters, outputs ----------------------------------------------------------------


def test_alarms_tell_somebody() -> None:
    """Errors, throttles, a queue that waits, dead letters and environments that stay."""
    found = {
        name: properties(name) for name, row in RESOURCES.items() if row["Type"] == "AWS::CloudWatch::Alarm"
    }
    assert {alarm["MetricName"] for alarm in found.values()} == {
        "5XXError",
        "Throttles",
        "ApproximateAgeOfOldestMessage",
        "ApproximateNumberOfMessagesVisible",
        "ExecutionEnvironmentCount",
    }
    for alarm in found.values():
        assert alarm["AlarmActions"] == alarm["OKActions"] == ["AlarmTopic"]
        assert alarm["TreatMissingData"] == "notBreaching"
    assert found["DlqAlarm"]["Dimensions"] == [{"Name": "QueueName", "Value": "BatchDlq.QueueName"}]
    names = {row["Name"]: row["Value"] for row in found["ErrorsAlarm"]["Dimensions"]}
    assert names == {"ApiName": properties("Api")["Name"], "Stage": properties("Api")["StageName"]}


def test_every_parameter_is_described_and_has_its_place_in_the_form() -> None:
    """What has no default is what only its owner can know."""
    groups = TEMPLATE["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    assert sorted(name for group in groups for name in group["Parameters"]) == sorted(PARAMETERS)
    assert not [name for name, row in PARAMETERS.items() if not row.get("Description")]
    assert {name for name, row in PARAMETERS.items() if "Default" not in row} == set(GIVEN)


def test_the_example_of_a_configuration_is_of_this_template() -> None:
    """Names and values, once what is in capitals is filled in."""
    text = (ROOT / "samconfig.example.toml").read_text()
    for capitals, value in (
        ("ACCOUNT", "123456789012"),
        ("DIGEST", "0" * 64),
        ("SUBNET", "subnet-0"),
        ("GROUP", "sg-0"),
    ):
        text = text.replace(capitals, value)
    given = tomllib.loads(text)["default"]["deploy"]["parameters"]["parameter_overrides"]
    values = dict(override.split("=", 1) for override in given)
    assert values.keys() <= PARAMETERS.keys()
    for name, value in values.items():
        assert re.search(PARAMETERS[name].get("AllowedPattern", ""), value), name
    assert set(GIVEN) <= values.keys()


def test_the_stack_prints_where_things_are() -> None:
    """The URL, a request to it, the buckets."""
    told = {name: resolver().value(output["Value"]) for name, output in TEMPLATE["Outputs"].items()}
    assert told["ModelBucket"] == "modelbucket"
    assert (told["BatchInput"], told["BatchOutput"]) == ("s3://batchbucket/in/", "s3://batchbucket/out/")
    assert told["Curl"] == f'curl -N {told["BaseUrl"]}/models -H "Authorization: Bearer $KEY"'
