"""The exceptions of kvmem.

    KVMemError
    ├── InputError               an argument cannot be used (also a ValueError)
    │   ├── EmptyInputError      empty text, question or corpus
    │   └── PromptTooLongError   does not fit the model's window, even after retrieval
    ├── UnknownDocumentError     no document with that id (also a LookupError)
    ├── UnknownMemoryError       no memory with that id (also a LookupError)
    ├── UnknownThreadError       no conversation of that name (also a LookupError)
    ├── ModelError
    │   └── ModelNotFoundError   no such path, hub id or alias
    ├── RemoteError              the server that runs the model cannot be reached, or broke off
    │   └── RefusedError         it does not take a request (also an InputError)
    ├── StoreError               the store directory cannot be used
    ├── AnswerTimeoutError       no answer within the time given (also a TimeoutError)
    └── ClosedError              the KVMem was closed

Every message ends with what to do next.
"""


class KVMemError(Exception):
    """Base class of every error raised on purpose by kvmem."""


class InputError(KVMemError, ValueError):
    """An argument cannot be used."""


class EmptyInputError(InputError):
    """A text, a question or the corpus is empty."""


class PromptTooLongError(InputError):
    """The prompt does not fit the model's window, even after retrieval."""


class UnknownDocumentError(KVMemError, LookupError):
    """There is no document with that id in this namespace."""


class UnknownMemoryError(KVMemError, LookupError):
    """There is no memory with that id in this space."""


class UnknownThreadError(KVMemError, LookupError):
    """There is no conversation of that name in this namespace."""


class ModelError(KVMemError):
    """The model cannot be loaded or used."""


class ModelNotFoundError(ModelError):
    """There is no model at that path, hub id or alias."""


class RemoteError(KVMemError):
    """The server that runs the model cannot be reached, broke off, or lacks what is needed."""


class RefusedError(InputError, RemoteError):
    """The server that runs the model does not take a request."""


class StoreError(KVMemError):
    """The store directory cannot be used."""


class AnswerTimeoutError(KVMemError, TimeoutError):
    """There was no answer within the time given."""


class ClosedError(KVMemError):
    """The object was closed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop, to be quoted in another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
