rule export:
    input:
        calibration=CALIBRATE,
        plan=PLAN,
        data=data_of,  # some of its calls are run again, for the parity certificate
        model=model_files,
    output:
        MANIFEST,  # written last, with the hash of every other file of the folder
    log:
        "logs/export/{scenario}.log",
    benchmark:
        "logs/benchmark/export/{scenario}.tsv"
    threads: THREADS
    params:
        **step("export"),
        folder=ARTEFACT,
    shell:
        "{HALFTONE} export {params.options} --calibration {input.calibration} --plan {input.plan}"
        " --data {input.data} -o {params.folder} &> {log}"


# Both seed sets of one shard. A scenario's images depend neither on the number of shards nor on their order.
rule sample:
    input:
        prompts=lambda wildcards: prompts_of(wildcards.scenario),
        source=source_of,
    output:
        SHARD,
    log:
        "logs/sample/{scenario}/{shard}.log",
    benchmark:
        "logs/benchmark/sample/{scenario}/{shard}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        **step("sample"),
        prompts=lambda wildcards, input: each("--prompts", input.prompts),
    shell:
        "{HALFTONE} sample {params.options} {params.prompts} --shard {wildcards.shard} -o {output} &> {log}"
