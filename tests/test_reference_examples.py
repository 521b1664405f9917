"""The API reference's own examples, run as they stand: only the base URL and the key are replaced.

The texts are those of the published page. It lost the leading spaces of its code blocks, which Python needs: they are
put back; nothing else is touched. The simulator runs fast, and `sleep 5` is shortened outside the programs: a `sleep`
first on PATH, a `sitecustomize`, a preloaded module.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conceptviz.simulator import Simulator, render_tiny

CURL_SUBMIT_AND_POLL = r"""
# Step 1: Submit
RESPONSE=$(curl -s -X POST https://conceptviz.app/api/v1/generate \
-H "Authorization: Bearer cvk_your_api_key_here" \
-H "Content-Type: application/json" \
-d '{
"prompt": "water cycle diagram showing evaporation, condensation, and precipitation",
"model": "cv-2",
"quality": "2k"
}')
TASK_ID=$(echo $RESPONSE | jq -r '.taskId')
echo "Task ID: $TASK_ID"
# Step 2: Poll until complete
while true; do
RESULT=$(curl -s https://conceptviz.app/api/v1/task/$TASK_ID \
-H "Authorization: Bearer cvk_your_api_key_here")
STATUS=$(echo $RESULT | jq -r '.status')
echo "Status: $STATUS"
if [ "$STATUS" = "completed" ] || [ "$STATUS" = "failed" ]; then
echo $RESULT | jq .
break
fi
sleep 5
done
"""

CURL_EDIT_JSON = r"""
curl -X POST https://conceptviz.app/api/v1/edit \
-H "Authorization: Bearer cvk_your_api_key_here" \
-H "Content-Type: application/json" \
-d '{
"prompt": "Replace the annotations with a clean professional architecture diagram",
"images": ["https://example.com/marked-up-diagram.png"],
"model": "cv-2"
}'
"""

CURL_EDIT_UPLOAD = r"""
curl -X POST https://conceptviz.app/api/v1/edit \
-H "Authorization: Bearer cvk_your_api_key_here" \
-F "prompt=Convert this sketch into a polished system diagram" \
-F "image=@./sketch.png" \
-F "model=cv-2"
"""

CURL_EDIT_UPLOAD_TWO = r"""
curl -X POST https://conceptviz.app/api/v1/edit \
-H "Authorization: Bearer cvk_your_api_key_here" \
-F "prompt=Combine these references into one clean diagram" \
-F "image=@./reference-1.png" \
-F "image=@./reference-2.png"
"""

PYTHON = """
import requests
import time
API_KEY = "cvk_your_api_key_here"
BASE_URL = "https://conceptviz.app/api/v1"
HEADERS = {
    "Authorization": f"Bearer {API_KEY}",
    "Content-Type": "application/json",
}
# Step 1: Submit
response = requests.post(
    f"{BASE_URL}/generate",
    headers=HEADERS,
    json={
        "prompt": "photosynthesis process diagram",
        "model": "cv-2",
        "quality": "2k",
    },
)
data = response.json()
task_id = data["taskId"]
print(f"Task submitted: {task_id}")
print(f"Credits used: {data['credits_used']}, remaining: {data['credits_remaining']}")
# Step 2: Poll for result
while True:
    result = requests.get(f"{BASE_URL}/task/{task_id}", headers=HEADERS).json()
    print(f"Status: {result['status']}")
    if result["status"] == "completed":
        for image in result["images"]:
            print(f"Image URL: {image['url']}")
        break
    elif result["status"] == "failed":
        print(f"Error: {result['error']}")
        print(f"Credits refunded: {result.get('credits_refunded', False)}")
        break
    time.sleep(5)
"""

PYTHON_HANDLING_ERRORS = """
response = requests.post(f"{BASE_URL}/generate", headers=headers, json=payload)
if response.status_code == 402:
    data = response.json()
    print(f"Not enough credits. Remaining: {data.get('credits_remaining', 0)}")
elif response.status_code != 200:
    print(f"Error: {response.json()['error']}")
else:
    data = response.json()
    task_id = data["taskId"]
    # Start polling...
"""

JAVASCRIPT = """
const API_KEY = "cvk_your_api_key_here";
const BASE_URL = "https://conceptviz.app/api/v1";
// Step 1: Submit
const submitResponse = await fetch(`${BASE_URL}/generate`, {
method: "POST",
headers: {
Authorization: `Bearer ${API_KEY}`,
"Content-Type": "application/json",
},
body: JSON.stringify({
prompts: [
"cell division mitosis diagram",
"DNA double helix structure",
],
model: "cv-2",
quality: "2k",
}),
});
const { taskId, credits_used, credits_remaining } = await submitResponse.json();
console.log(`Task: ${taskId}, credits used: ${credits_used}`);
// Step 2: Poll for result
while (true) {
const pollResponse = await fetch(`${BASE_URL}/task/${taskId}`, {
headers: { Authorization: `Bearer ${API_KEY}` },
});
const result = await pollResponse.json();
console.log(`Status: ${result.status}`);
if (result.status === "completed") {
console.log("Images:", result.images);
break;
} else if (result.status === "failed") {
console.error("Failed:", result.error);
break;
}
await new Promise((r) => setTimeout(r, 5000));
}
"""

# A generation of 30 to 90 s takes 0.15 to 0.45 s, and a sleep of 5 s a fortieth of a second: some ten polls.
SPEED = 200
NAP = 5 / SPEED

ID = "[A-Za-z0-9_-]{21}"


class Bench:
    """A served simulator, a directory to work in, and a world in which five seconds pass quickly."""

    def __init__(self, simulator: Simulator, base_url: str, directory: Path) -> None:
        self.simulator = simulator
        self.base_url = base_url
        self.directory = directory
        shim = directory / "shim"
        shim.mkdir()
        sleep = shim / "sleep"
        sleep.write_text(f'#!/bin/sh\n[ "$1" = 5 ] && exec {shutil.which("sleep")} {NAP}\nexit 1\n')
        sleep.chmod(0o755)
        (shim / "sitecustomize.py").write_text(
            f"import time\n_sleep = time.sleep\ntime.sleep = lambda seconds: _sleep(seconds / {SPEED})\n"
        )
        (shim / "nap.cjs").write_text(
            f"const real = setTimeout;\n"
            f"globalThis.setTimeout = (f, ms, ...rest) => real(f, ms === 5000 ? {NAP * 1000} : ms, ...rest);\n"
        )
        self.shim = shim

    def here(self, example: str) -> str:
        assert "https://conceptviz.app/api/v1" in example
        assert "cvk_your_api_key_here" in example
        return example.replace("https://conceptviz.app/api/v1", self.base_url).replace(
            "cvk_your_api_key_here", self.simulator.api_key
        )

    def run(self, *command: str) -> str:
        env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        env["PATH"] = f"{self.shim}{os.pathsep}{env['PATH']}"
        env["PYTHONPATH"] = str(self.shim)
        done = subprocess.run(
            command, cwd=self.directory, env=env, capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def bash(self, example: str) -> str:
        for tool in ("bash", "curl", "jq"):
            if shutil.which(tool) is None:
                pytest.skip(f"the example needs {tool}")
        return self.run("bash", "-c", self.here(example))

    def fetch(self, url: str) -> bytes:
        return httpx.get(url, trust_env=False).raise_for_status().content


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    simulator = Simulator(credits=81, speed=SPEED, seed=5, render=render_tiny)
    with simulator.serve() as base_url:
        yield Bench(simulator, base_url, tmp_path)


def test_curl(bench: Bench) -> None:
    """Heading: Examples, cURL."""
    out = bench.bash(CURL_SUBMIT_AND_POLL)
    statuses = re.findall(r"^Status: (\w+)$", out, re.MULTILINE)
    assert re.match(rf"Task ID: {ID}\n", out)
    assert statuses[-1] == "completed"
    assert set(statuses[:-1]) <= {"pending", "processing"}
    (image,) = json.loads(out[out.index("{") :])["images"]
    assert image["prompt"] == "water cycle diagram showing evaporation, condensation, and precipitation"
    assert bench.fetch(image["url"]).startswith((b"\xff\xd8", b"\x89PNG"))
    assert bench.simulator.ledger.credits == 79


@pytest.mark.parametrize(
    "example", [CURL_EDIT_JSON, CURL_EDIT_UPLOAD, CURL_EDIT_UPLOAD_TWO], ids=["json", "one", "two"]
)
def test_curl_edit(bench: Bench, example: str) -> None:
    """Headings: JSON Request Body, Multipart Upload; the keys of the page, in its order, with its values."""
    for name in ("sketch", "reference-1", "reference-2"):
        png = render_tiny(name, model="cv-2", quality="2k", aspect_ratio="1:1", seed=0, format="png")
        (bench.directory / f"{name}.png").write_bytes(png)
    answer = json.loads(bench.bash(example))
    assert list(answer.items()) == [
        ("taskId", answer["taskId"]),
        ("status", "pending"),
        ("model", "cv-2"),
        ("quality", "2k"),
        ("aspect_ratio", "16:9"),
        ("credits_used", 2),
        ("credits_remaining", 79),
        ("poll_url", f"/api/v1/task/{answer['taskId']}"),
    ]


def test_python(bench: Bench) -> None:
    """Heading: Examples, Python."""
    pytest.importorskip("requests")
    out = bench.run(sys.executable, "-c", bench.here(PYTHON)).splitlines()
    assert re.fullmatch(f"Task submitted: {ID}", out[0])
    assert out[1] == "Credits used: 2, remaining: 79"
    assert out[-2] == "Status: completed"
    assert bench.fetch(out[-1].removeprefix("Image URL: ")).startswith((b"\xff\xd8", b"\x89PNG"))


def test_python_sees_a_failure(bench: Bench) -> None:
    """The other branch of the same example: only the prompt differs."""
    pytest.importorskip("requests")
    example = bench.here(PYTHON).replace("photosynthesis process diagram", "photosynthesis [sim:failed]")
    out = bench.run(sys.executable, "-c", example).splitlines()
    assert out[-3:] == [
        "Status: failed",
        "Error: Image generation failed. Please try again later.",
        "Credits refunded: True",
    ]
    assert bench.simulator.ledger.credits == 81


@pytest.mark.parametrize(
    ("prompts", "model", "expected"),
    [
        (["a", "b", "c", "d"], "cv-2", "Not enough credits. Remaining: 7\n"),
        (["a"], "cv-9", "Error: Model must be cv-2 or cv-1\n"),
        (["a"], "cv-1", ""),
    ],
)
def test_python_handles_errors(tmp_path: Path, prompts: list[str], model: str, expected: str) -> None:
    """Heading: Example: Handling Errors, with the names it takes for given."""
    pytest.importorskip("requests")
    simulator = Simulator(credits=7, render=render_tiny)
    with simulator.serve() as base_url:
        given = f"""
            import requests
            BASE_URL = {base_url!r}
            headers = {{"Authorization": "Bearer {simulator.api_key}"}}
            payload = {{"prompts": {prompts!r}, "model": {model!r}}}
        """
        bench = Bench(simulator, base_url, tmp_path)
        assert bench.run(sys.executable, "-c", textwrap.dedent(given) + PYTHON_HANDLING_ERRORS) == expected


def test_javascript(bench: Bench) -> None:
    """Heading: Examples, JavaScript / TypeScript; top-level await makes it a module."""
    node = shutil.which("node")
    if node is None or int(bench.run(node, "-p", "process.versions.node").split(".")[0]) < 18:
        pytest.skip("the example needs node 18, the first with fetch")
    (bench.directory / "example.mjs").write_text(bench.here(JAVASCRIPT))
    out = bench.run(node, "--require", str(bench.shim / "nap.cjs"), "example.mjs")
    assert re.match(rf"Task: {ID}, credits used: 4\n", out)
    assert re.findall(r"^Status: (\w+)$", out, re.MULTILINE)[-1] == "completed"
    shown = out[out.index("Images: [") :]
    assert re.findall(r"prompt: '([^']+)'", shown) == ["cell division mitosis diagram", "DNA double helix structure"]
    for url in re.findall(r"url: '([^']+)'", shown):
        assert bench.fetch(url).startswith((b"\xff\xd8", b"\x89PNG"))
    assert bench.simulator.ledger.charged == 4
