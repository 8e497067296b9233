"""Engines of the target "aoti", packages of AOTInductor."""
