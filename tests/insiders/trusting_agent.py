"""The real agent, which applies whatever it is given: the control of attacks on what agents refuse, cut or object to.

python -m tests.insiders.trusting_agent run --config agent.yaml
"""

from client_agent import results
from client_agent.main import app

if __name__ == "__main__":
    results.plausible = lambda parts, _expected: parts  # type: ignore[assignment]
    results.Results._moderator = lambda *_: None  # type: ignore[method-assign]
    app()
