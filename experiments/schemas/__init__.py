"""The schema of the configuration: a misspelt key or a wrong type fails at composition, with the key's name.

The values, and the reasons for them, are in conf/. A group whose members differ in their keys has one class a member,
registered as the group's `schema_*` (experiments.config) and named first in the member's defaults.
"""
