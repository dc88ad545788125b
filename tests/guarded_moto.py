"""moto's server, as `python -m moto.server` is, that knows more of what an operation is about.

Once it checks policies (`ObjectStore.guarded`), it looks at the resource of operations of S3 and SQS. For
those of DynamoDB and Secrets Manager it takes `*`, so that a policy that names a table or a secret would
allow nothing. Here their resource is known too, and TransactWriteItems is what it does, as in IAM:
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/transaction-apis-iam.html
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from moto.core.authorization import ActionAuthenticatorMixin
from moto.dynamodb.responses import DynamoHandler
from moto.secretsmanager.responses import SecretsManagerResponse
from moto.server import main

PARTS = {"TransactWriteItems": "TransactItems", "TransactGetItems": "TransactItems"}


def steps(request: Any) -> Iterator[tuple[str, str]]:
    """The actions that a request to DynamoDB needs, and the table of each."""
    operation, given = request._get_action(), request.body
    if operation not in PARTS:
        yield operation, given.get("TableName", "*")
        return
    for item in given[PARTS[operation]]:
        for name, part in item.items():  # {"Update": {...}}
            yield name if name == "ConditionCheck" else f"{name}Item", part["TableName"]


def check_tables(request: Any, resource: str = "*") -> None:
    """See that who asks may do each of the `steps`."""
    del resource
    for action, table in steps(request):
        name = table.rpartition("/")[2]
        arn = f"arn:aws:dynamodb:{request.region}:{request.current_account}:table/{name}"
        request._get_action = lambda action=action: action
        try:
            ActionAuthenticatorMixin._authenticate_and_authorize_normal_action(request, arn)
        finally:
            del request._get_action


def secret_arn(request: Any) -> str:
    """The ARN of the secret that a request is about."""
    secret = request.backend.secrets.get(request._get_param("SecretId") or "")
    return secret.arn if secret else "*"


if __name__ == "__main__":
    handlers: Any = (
        DynamoHandler,
        SecretsManagerResponse,
    )  # moto has made its routes of them: they are changed
    handlers[0]._authenticate_and_authorize_normal_action = check_tables
    handlers[1]._determine_resource = secret_arn
    main(sys.argv[1:])
