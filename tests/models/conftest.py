"""One thread for small models, and what holds for every weight file that must not load."""

import pytest
import torch

from ekd_ray.errors import UserError
from ekd_ray.models import load_weights


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads gain nothing on models this small and stall on a machine that others share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused():
    """Load a bad file into a model: one line for the user, the model unchanged."""

    def check(model, path):
        """The message of the UserError; checks what is promised of all of them."""
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(UserError) as caught:
            load_weights(model, path)
        message = str(caught.value)
        assert "\n" not in message
        assert repr(str(path))[1:-1] in message
        assert message.endswith(".")
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        return message

    return check
