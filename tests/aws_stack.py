"""What template.yaml makes, in moto's server: buckets, queues, table, secret and roles, under its policies.

    with serving(folder) as aws:              # one server for many stacks; the fixture `guarded_aws`
        stack = make(aws)                     # the fixture `aws_stack`, one for each test
        stack.client("s3").put_object(Bucket=stack.ids["BatchBucket"], Key="in/a.jsonl", Body=b"...")
        subprocess.run([..., "-m", "handler"], env={**os.environ, **stack.environ})

`ids` has what CloudFormation's `Ref` gives of each resource, by its name in the template. `environ` is what
the function's environment would be, with the credentials of its role. `client` is an administrator's,
`worker_client` the worker's. The server checks policies: what the role may not do is refused.

The values come from template.yaml as it is: of these types the SAM transform changes nothing, which
tests/acceptance/test_template.py checks. Left out are the policies of buckets and queues, because moto does
not look at `aws:SecureTransport` and would refuse everything. Of an object that is not there moto says 404
also to who may not list the bucket, where S3 says 403.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests import cloudformation, object_store
from tests.cloudformation import PSEUDO, Resolver
from tests.object_store import REGION, ObjectStore

SERVER = "tests.guarded_moto"
GIVEN = {
    "ImageUri": f"{PSEUDO['AWS::AccountId']}.dkr.ecr.{REGION}.amazonaws.com/firsttoken@sha256:{'0' * 64}",
    "SubnetIds": ["subnet-0123456789abcdef0"],
    "SecurityGroupIds": ["sg-0123456789abcdef0"],
}
"""Parameters that have no default."""


@dataclass(frozen=True)
class Aws:
    """The server, and an administrator's credentials."""

    store: ObjectStore
    admin: Mapping[str, str]


@dataclass(frozen=True)
class AwsStack:
    """One stack; see above."""

    aws: Aws
    ids: Mapping[str, str]
    environ: Mapping[str, str]
    outputs: Mapping[str, str]
    properties: Mapping[str, Any] = field(repr=False)
    """Properties of each resource that was made, all functions worked out."""

    def client(self, service: str) -> Any:
        """A client of boto3's, which may do everything."""
        return _client(service, self.aws.store.url, self.aws.admin)

    def worker_client(self, service: str) -> Any:
        """A client of boto3's with the credentials of the worker's role."""
        return _client(service, self.aws.store.url, self.environ)


@contextmanager
def serving(folder: Path) -> Iterator[Aws]:
    """Run the server, with an administrator, its log in `folder`. It checks policies from then on."""
    with object_store.serving(folder, SERVER) as store:
        iam = store.client("iam")
        iam.create_user(UserName="admin")
        everything = {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
        }
        iam.put_user_policy(UserName="admin", PolicyName="admin", PolicyDocument=json.dumps(everything))
        key = iam.create_access_key(UserName="admin")["AccessKey"]
        admin = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        with store.guarded():
            yield Aws(store, admin)


def make(aws: Aws, **parameters: Any) -> AwsStack:
    """Make a stack with these `parameters`; two of one server have nothing in common."""
    template = cloudformation.load()
    maker = _Maker(aws, template["Resources"])
    resolver = Resolver(template, {**GIVEN, **parameters}, maker.attribute, maker.stack)
    maker.resolver = resolver
    for name, resource in template["Resources"].items():
        if resource["Type"] in MAKERS and resolver.holds_for(resource):
            maker.ids(name)
    variables = resolver.value(template["Resources"]["Worker"]["Properties"]["Environment"]["Variables"])
    credentials = maker.credentials("WorkerRole")
    outputs = {name: output["Value"] for name, output in template["Outputs"].items()}
    return AwsStack(
        aws,
        {name: made["Ref"] for name, made in maker.made.items()},
        {**variables, **object_store.environ(aws.store.url), **credentials},
        {name: resolver.value(value) for name, value in outputs.items()},
        maker.properties,
    )


def _client(service: str, url: str, environ: Mapping[str, str]) -> Any:
    import boto3  # noqa: PLC0415 - most tests of a run need none

    return boto3.client(
        service,
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        aws_session_token=environ.get("AWS_SESSION_TOKEN"),
    )


class _Maker:
    """Makes resources as they are asked for: each is there before what refers to it."""

    resolver: Resolver

    def __init__(self, aws: Aws, resources: Mapping[str, Any]) -> None:
        self.stack = f"test-{secrets.token_hex(4)}"
        self.made: dict[str, dict[str, str]] = {}
        """What `Ref` and `GetAtt` give of each resource that is there."""
        self.properties: dict[str, Any] = {}
        self._aws = aws
        self._resources = resources

    def client(self, service: str) -> Any:
        return _client(service, self._aws.store.url, self._aws.admin)

    def attribute(self, name: str, attribute: str | None) -> str:
        return self.ids(name)[attribute or "Ref"]

    def ids(self, name: str) -> dict[str, str]:
        """What `Ref` and `GetAtt` give of a resource, which is made if it is not there yet."""
        if name not in self.made:
            resource = self._resources[name]
            make = MAKERS.get(resource["Type"])
            if make is None:  # moto has no such thing, and what refers to it needs a name only
                return {"Ref": f"{self.stack}-{name}", "Arn": f"arn:aws:other:::{self.stack}-{name}"}
            properties = self.properties[name] = self.resolver.value(resource.get("Properties", {}))
            self.made[name] = make(self, f"{self.stack}-{name}", properties)
        return self.made[name]

    def credentials(self, role: str) -> dict[str, str]:
        """Credentials of a role that only Lambda may take, which the server would see to."""
        address = f"{self._aws.store.url}/moto-api/reset-auth"
        httpx.post(address, content="inf", timeout=60).raise_for_status()
        try:
            taken = self.client("sts").assume_role(RoleArn=self.ids(role)["Arn"], RoleSessionName="worker")
        finally:
            httpx.post(address, content="0", timeout=60).raise_for_status()
        return {
            "AWS_ACCESS_KEY_ID": taken["Credentials"]["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": taken["Credentials"]["SecretAccessKey"],
            "AWS_SESSION_TOKEN": taken["Credentials"]["SessionToken"],
        }


def _queue(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    attributes = {
        key: json.dumps(value)
        if isinstance(value, dict)
        else str(value).lower()
        if value is True
        else str(value)
        for key, value in properties.items()
    }
    sqs = maker.client("sqs")
    url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    return {"Ref": url, "Arn": arn, "QueueName": name}


def _bucket(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    name, s3 = name.lower(), maker.client("s3")
    s3.create_bucket(Bucket=name)
    s3.put_public_access_block(
        Bucket=name, PublicAccessBlockConfiguration=properties["PublicAccessBlockConfiguration"]
    )
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration=properties["VersioningConfiguration"])
    encryption = [
        {
            "ApplyServerSideEncryptionByDefault": rule["ServerSideEncryptionByDefault"],
            "BucketKeyEnabled": rule["BucketKeyEnabled"],
        }
        for rule in properties["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    ]
    s3.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration={"Rules": encryption})
    rules = [_lifecycle(rule) for rule in properties["LifecycleConfiguration"]["Rules"]]
    s3.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": rules})
    queues = [
        {
            "QueueArn": row["Queue"],
            "Events": [row["Event"]],
            "Filter": {"Key": {"FilterRules": row["Filter"]["S3Key"]["Rules"]}},
        }
        for row in properties.get("NotificationConfiguration", {}).get("QueueConfigurations", ())
    ]
    s3.put_bucket_notification_configuration(
        Bucket=name, NotificationConfiguration={"QueueConfigurations": queues}
    )
    return {"Ref": name, "Arn": f"arn:aws:s3:::{name}"}


def _lifecycle(rule: Mapping[str, Any]) -> dict[str, Any]:
    """A rule as the API has it: it differs from the template's in some names."""
    found: dict[str, Any] = {
        "ID": rule["Id"],
        "Status": rule["Status"],
        "Filter": {"Prefix": rule.get("Prefix", "")},
    }
    if "ExpirationInDays" in rule:
        found["Expiration"] = {"Days": int(rule["ExpirationInDays"])}
    if "ExpiredObjectDeleteMarker" in rule:
        found["Expiration"] = {"ExpiredObjectDeleteMarker": rule["ExpiredObjectDeleteMarker"]}
    same = ("AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration")
    return {**found, **{key: rule[key] for key in same if key in rule}}


def _table(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    dynamodb = maker.client("dynamodb")
    keys = ("AttributeDefinitions", "KeySchema", "BillingMode")
    arn = dynamodb.create_table(TableName=name, **{key: properties[key] for key in keys})["TableDescription"][
        "TableArn"
    ]
    dynamodb.update_time_to_live(
        TableName=name, TimeToLiveSpecification=properties["TimeToLiveSpecification"]
    )
    return {"Ref": name, "Arn": arn}


def _secret(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    made = maker.client("secretsmanager").create_secret(Name=name, SecretString=properties["SecretString"])
    return {"Ref": made["ARN"]}


def _logs(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    logs = maker.client("logs")
    logs.create_log_group(logGroupName=name)
    logs.put_retention_policy(logGroupName=name, retentionInDays=int(properties["RetentionInDays"]))
    found = logs.describe_log_groups(logGroupNamePrefix=name)["logGroups"][0]
    return {"Ref": name, "Arn": found["arn"]}


def _topic(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    del properties
    return {"Ref": maker.client("sns").create_topic(Name=name)["TopicArn"]}


def _policy(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    document = json.dumps(properties["PolicyDocument"])
    made = maker.client("iam").create_policy(PolicyName=name, PolicyDocument=document)
    return {"Ref": made["Policy"]["Arn"]}


def _role(maker: _Maker, name: str, properties: Mapping[str, Any]) -> dict[str, str]:
    iam, trust = maker.client("iam"), json.dumps(properties["AssumeRolePolicyDocument"])
    arn = iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    for policy in properties.get("ManagedPolicyArns", ()):
        if not policy.startswith("arn:aws:iam::aws:"):  # moto has not all of AWS's own
            iam.attach_role_policy(RoleName=name, PolicyArn=policy)
    for policy in properties.get("Policies", ()):
        document = json.dumps(policy["PolicyDocument"])
        iam.put_role_policy(RoleName=name, PolicyName=policy["PolicyName"], PolicyDocument=document)
    return {"Ref": name, "Arn": arn}


MAKERS = {
    "AWS::DynamoDB::Table": _table,
    "AWS::IAM::ManagedPolicy": _policy,
    "AWS::IAM::Role": _role,
    "AWS::Logs::LogGroup": _logs,
    "AWS::S3::Bucket": _bucket,
    "AWS::SNS::Topic": _topic,
    "AWS::SQS::Queue": _queue,
    "AWS::SecretsManager::Secret": _secret,
}
"""Types that moto has, and what makes one of each."""
