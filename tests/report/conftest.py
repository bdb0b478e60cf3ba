"""What tests of reports share."""

from reporting import problem, whole

__all__ = ["problem", "whole"]
