"""The models that a CPU server can serve, as SGLang looks for them (SGLANG_EXTERNAL_MODEL_PACKAGE): one module each, with an EntryClass.

Where such a package is named, SGLang imports its own models only when the model is none of these.
"""
