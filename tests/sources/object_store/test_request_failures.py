"""What is said of a failed request, tracebacks included, holds no password."""

import traceback

import pytest
from obstore.exceptions import GenericError

from engine_loader.errors import TransferError
from engine_loader.sources.object_store.request_failures import object_failure

HIDDEN = "swordfish"


@pytest.mark.parametrize(
    "text",
    [
        f"error sending request: proxy http://me:{HIDDEN}@proxy:3128 refused\n\nDebug source: Proxy(http://me:{HIDDEN}@p)",
        f"GET https://b.s3.amazonaws.com/x?X-Amz-Signature={HIDDEN}&X-Amz-Credential={HIDDEN}%2Fus-east-1 failed",
        f"https://account.blob.core.windows.net/c/b?sv=2024&sig={HIDDEN}",
        f'headers: {{"authorization": "Bearer {HIDDEN}"}}',
    ],
)
def test_neither_the_error_nor_its_causes_hold_a_secret(text: str) -> None:
    with pytest.raises(TransferError, match="could not read") as caught:
        try:
            try:
                raise ValueError(text)
            except ValueError as inner:
                raise GenericError(text) from inner
        except GenericError as error:
            raise object_failure(error, "read", "s3://bucket/x", 0) from error
    shown = "".join(traceback.format_exception(caught.value))
    assert HIDDEN not in shown
    assert "***" in shown, "what is left still says where it was"
