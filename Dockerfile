# The program in a container, on the processor: docker build -t llm-attack .
FROM python:3.11-slim
WORKDIR /llm_attack
COPY pyproject.toml README.md LICENSE constraints.txt hatch_build.py _llm_attack_shim.py llm_attack_shim.pth ./
COPY llm_attack llm_attack
COPY tasks tasks
RUN pip install --no-cache-dir -c constraints.txt .
RUN useradd --create-home runner
USER runner
WORKDIR /home/runner
ENTRYPOINT ["llm-attack"]
CMD ["--help"]
