"""Objects in S3 and whatever speaks its language: list, read, upload, and addresses that are signed for a while.

Addresses are signed with version 4 for the bucket's own region: the default of presigned ones is version 2 in us-east-1, which newer
buckets and most other services refuse. Another endpoint (`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`: Lambda's filesystem adapter,
MinIO, R2 …) is addressed by path. An address dies with the session that signed it, so it is made when it is used.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from provisioning.aws import Aws, refusal
from provisioning.base import CredentialsError, InvalidHardware, Refused

GET_SECONDS = 12 * 3600
LONGEST_SECONDS = 7 * 86_400
"""S3's limit of a signed address."""
SMALL_BYTES = 64 * 2**20
"""From here on an upload is made of parts."""
MOST_PARTS = 9_000
AT_ONCE = 4


@dataclass(frozen=True)
class ObjectInfo:
    """An object of a bucket."""

    key: str
    """s3://bucket/key"""
    bytes: int
    etag: str


def split(key: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`. Raises InvalidHardware."""
    bucket, _, rest = key.removeprefix("s3://").partition("/")
    if not key.startswith("s3://") or not bucket:
        raise InvalidHardware(
            f"{key!r} is no s3:// name", code="s3-name", hint="write s3://BUCKET/FOLDER/FILE"
        )
    return bucket, rest


class S3:
    """Objects by their whole names, `s3://bucket/key`. Threads may share one."""

    def __init__(self, aws: Aws | None = None) -> None:
        self._aws = aws or Aws()
        self._regions: dict[str, str] = {}
        self._lock = threading.Lock()

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """Every object whose key starts with `prefix`. Raises ProviderError."""
        bucket, start = split(prefix)
        found: list[ObjectInfo] = []
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", bucket, Prefix=start, **token)
            found += [
                ObjectInfo(f"s3://{bucket}/{item['Key']}", int(item["Size"]), str(item["ETag"]).strip('"'))
                for item in page.get("Contents") or ()
            ]
            if not page.get("IsTruncated"):
                return found
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def presign_get(self, key: str, seconds: int = GET_SECONDS) -> str:
        """An address from which the object can be read for a while without credentials."""
        return self._presign("get_object", key, seconds)

    def presign_put(self, key: str, seconds: int = GET_SECONDS) -> str:
        """An address to which this one object can be written, again and again, for a while."""
        return self._presign("put_object", key, seconds)

    def read(self, key: str) -> bytes:
        """A small object whole. Raises Refused (NoSuchKey), ProviderError."""
        bucket, name = split(key)
        from botocore.exceptions import BotoCoreError

        from provisioning.aws import without_answer

        answer = self._call("get_object", bucket, Key=name)
        try:
            body: bytes = answer["Body"].read()
        except BotoCoreError as error:
            raise without_answer(error, f"get_object {key}", effect=False) from None
        return body

    def write(self, key: str, data: bytes) -> None:
        """A small object, whole or not at all. Raises ProviderError."""
        bucket, name = split(key)
        self._call("put_object", bucket, Key=name, Body=data, ContentMD5=_md5(data))

    def delete(self, key: str) -> None:
        """Take an object away; one that is gone is a success."""
        bucket, name = split(key)
        self._call("delete_object", bucket, Key=name)

    def put(
        self,
        path: Path,
        key: str,
        progress: Callable[[int], None] = lambda _: None,
        part_bytes: int = SMALL_BYTES,
    ) -> None:
        """Upload a file, in parts side by side where it is large; each is checked by its MD5 as it arrives. An upload that broke goes
        on with the parts that are missing. `progress` is told the bytes of each part. Raises ProviderError, OSError."""
        bucket, name = split(key)
        size = path.stat().st_size
        if size <= part_bytes:
            self.write(key, path.read_bytes())
            progress(size)
            return
        part_bytes = max(part_bytes, -(-size // MOST_PARTS))
        upload, there = self._begun(bucket, name)
        numbers = range(1, -(-size // part_bytes) + 1)

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                data = _slice(file, (number - 1) * part_bytes, part_bytes)
            if there.get(number) != hashlib.md5(data, usedforsecurity=False).hexdigest():
                self._call(
                    "upload_part",
                    bucket,
                    Key=name,
                    UploadId=upload,
                    PartNumber=number,
                    Body=data,
                    ContentMD5=_md5(data),
                )
            progress(len(data))
            return {"PartNumber": number, "ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'}

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="part") as pool:
            parts = list(pool.map(send, numbers))
        self._call(
            "complete_multipart_upload", bucket, Key=name, UploadId=upload, MultipartUpload={"Parts": parts}
        )

    def _begun(self, bucket: str, name: str) -> tuple[str, Mapping[int, str]]:
        """The id of an upload of this object that broke, with the MD5 of each part that arrived; else a new one."""
        begun = [
            item
            for item in self._call("list_multipart_uploads", bucket, Prefix=name).get("Uploads") or ()
            if item["Key"] == name
        ]
        if not begun:
            return str(self._call("create_multipart_upload", bucket, Key=name)["UploadId"]), {}
        upload = max(begun, key=lambda item: item["Initiated"])["UploadId"]
        return upload, dict(self._parts(bucket, name, upload))

    def _parts(self, bucket: str, name: str, upload: str) -> Iterator[tuple[int, str]]:
        marker = 0
        while True:
            page = self._call("list_parts", bucket, Key=name, UploadId=upload, PartNumberMarker=marker)
            for item in page.get("Parts") or ():
                yield int(item["PartNumber"]), str(item["ETag"]).strip('"')
            if not page.get("IsTruncated"):
                return
            marker = int(page["NextPartNumberMarker"])

    # ------------------------------------------------------------ clients

    def _presign(self, operation: str, key: str, seconds: int) -> str:
        from botocore.exceptions import BotoCoreError, NoCredentialsError

        bucket, name = split(key)
        client = self._client(bucket)
        try:
            url: str = client.generate_presigned_url(
                operation, Params={"Bucket": bucket, "Key": name}, ExpiresIn=min(seconds, LONGEST_SECONDS)
            )
        except NoCredentialsError as error:
            raise CredentialsError(
                f"there are no AWS credentials: {error}", code="no-key", hint="run `aws configure`"
            ) from None
        except BotoCoreError as error:
            raise CredentialsError(
                f"{key} cannot be signed: {error}", code="login", hint="log in again: aws sso login"
            ) from None
        return url

    def _client(self, bucket: str) -> Any:
        """The client of a bucket's region."""
        with self._lock:
            region = self._regions.get(bucket)
        if region is None:
            region = self._find_region(bucket)
            with self._lock:
                self._regions[bucket] = region
        return self._of(region)

    def _of(self, region: str) -> Any:
        own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        style = {"addressing_style": "path" if own else "virtual"}
        # Checksum trailers are AWS's own; other services refuse them. Parts carry their MD5 instead.
        return self._aws.client("s3", region, signature_version="s3v4", s3=style,
                                request_checksum_calculation="when_required", response_checksum_validation="when_required")  # fmt: skip

    def _find_region(self, bucket: str) -> str:
        """The bucket's region, which S3 tells even where it refuses. Raises Refused, CredentialsError."""
        from botocore.exceptions import ClientError

        client = self._of(self._aws.region)
        try:
            answer = self._told(client, "head_bucket", {"Bucket": bucket})
        except ClientError as error:
            answer = error.response
            headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
            status = answer["ResponseMetadata"].get("HTTPStatusCode")
            if status == 404:
                hint = f"check the name; `aws s3 mb s3://{bucket}` makes one"
                raise Refused(
                    f"NoSuchBucket: there is no bucket {bucket}", code="NoSuchBucket", hint=hint
                ) from None
            if status in {401, 403} and "x-amz-bucket-region" not in headers:
                hint = "attach provisioning/iam-policy.json with the bucket's name in it to this identity, or check whose bucket it is"
                raise CredentialsError(f"AccessDenied: bucket {bucket} may not be read by these credentials", code="AccessDenied",
                                       hint=hint) from None  # fmt: skip
            if status not in {301, 307, 400, 401, 403}:
                raise refusal(error, "head_bucket", {}, effect=False) from None
        return str(
            answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region") or self._aws.region
        )

    def _call(self, operation: str, bucket: str, **parameters: Any) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        try:
            return self._told(self._client(bucket), operation, {"Bucket": bucket, **parameters})
        except ClientError as error:
            raise refusal(error, f"{operation} s3://{bucket}", {}, effect=False) from None

    @staticmethod
    def _told(client: Any, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One exchange. Raises ClientError for what S3 refuses, ProviderError for silence."""
        from botocore.exceptions import BotoCoreError
        from botocore.parsers import ResponseParserError

        from provisioning.aws import without_answer

        try:
            answer: dict[str, Any] = getattr(client, operation)(**parameters)
        except (BotoCoreError, ResponseParserError) as error:
            raise without_answer(error, operation, effect=False) from None
        return answer


def etag_of(path: Path, part_bytes: int = SMALL_BYTES) -> str:
    """The ETag that `S3.put` of a file leads to: its MD5, or that of its parts' MD5s and their number (unless the bucket encrypts
    with KMS; then it is never equal)."""
    size = path.stat().st_size
    if size <= part_bytes:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    part_bytes = max(part_bytes, -(-size // MOST_PARTS))
    whole, count = hashlib.md5(usedforsecurity=False), 0
    with path.open("rb") as file:
        while data := file.read(part_bytes):
            whole.update(hashlib.md5(data, usedforsecurity=False).digest())
            count += 1
    return f"{whole.hexdigest()}-{count}"


def _slice(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
