"""What schemathesis holds every answer to beside its own checks; its command line loads this by SCHEMATHESIS_HOOKS."""

import schemathesis


@schemathesis.check
def no_traceback(ctx, response, case):
    assert "Traceback" not in response.text
