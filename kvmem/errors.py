"""The exceptions of kvmem.

    KVMemError
    ├── InputError               an argument is not valid (also a ValueError)
    │   ├── EmptyInputError      empty text, question or corpus
    │   └── PromptTooLongError   the prompt does not fit the model's window, even after retrieval
    ├── UnknownDocumentError     no document with that id (also a LookupError)
    ├── UnknownMemoryError       no memory with that id (also a LookupError)
    ├── UnknownThreadError       no thread with that name (also a LookupError)
    ├── ModelError
    │   └── ModelNotFoundError   no such path, hub id or alias
    ├── RemoteError              the model server cannot be reached, dropped the connection, or lacks a feature
    │   └── RefusedError         the model server rejected a request (also an InputError)
    ├── StoreError               the store cannot be used
    ├── AnswerTimeoutError       no answer within the timeout (also a TimeoutError)
    └── ClosedError              the KVMem is closed

Every message says what to do next.
"""


class KVMemError(Exception):
    """Base class of all errors that kvmem raises on purpose."""


class InputError(KVMemError, ValueError):
    """An argument is not valid."""


class EmptyInputError(InputError):
    """A text, a question or the corpus is empty."""


class PromptTooLongError(InputError):
    """The prompt does not fit the model's window, even after retrieval."""


class UnknownDocumentError(KVMemError, LookupError):
    """There is no document with that id in this namespace."""


class UnknownMemoryError(KVMemError, LookupError):
    """There is no memory with that id in this space."""


class UnknownThreadError(KVMemError, LookupError):
    """There is no thread with that name in this namespace."""


class ModelError(KVMemError):
    """The model cannot be loaded or used."""


class ModelNotFoundError(ModelError):
    """There is no model at that path, hub id or alias."""


class RemoteError(KVMemError):
    """The model server cannot be reached, dropped the connection, or lacks a required feature."""


class RefusedError(InputError, RemoteError):
    """The model server rejected a request."""


class StoreError(KVMemError):
    """The store cannot be used."""


class AnswerTimeoutError(KVMemError, TimeoutError):
    """There was no answer within the timeout."""


class ClosedError(KVMemError):
    """The object is closed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the final full stop, for use in another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
