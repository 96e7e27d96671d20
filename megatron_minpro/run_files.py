"""Names inside a run folder that several processes agree on."""

CONFIG_FILE = "config.yaml"  # the resolved configuration
ENDPOINTS_FILE = "endpoints.json"  # addresses of the rollout servers, once they answer
STOP_FILE = "stop"  # its presence asks the run to stop after the current global step
RESULT_FILE = "result.json"  # counters of the attempt that ended
ERROR_FILE = "error.txt"  # what the first rank to fail said
LOCK_FILE = "lock"  # held by the process that owns the run
EXPORT_FOLDER = "policy"  # the trained policy, Hugging Face format
INITIAL_MODEL_FOLDER = "initial_model"  # random weights that the base model starts from
