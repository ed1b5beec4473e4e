from halftone.workflow.proxy import analyses


# Full precision is measured by the same rule: its job also gives the floor, itself on other noise.
rule metrics:
    input:
        images=images_of,
        reference=reference_of,
        prompts=lambda wildcards: prompts_of(wildcards.scenario),
        artefact=artefact_of,
        real=real_images_of,
        networks=models.metric_files(SETTINGS.metrics),
    output:
        METRICS,
        FEATURES,
    log:
        "logs/metrics/{scenario}.log",
    benchmark:
        "logs/benchmark/metrics/{scenario}.tsv"
    threads: THREADS
    params:
        **step("metrics"),
        images=lambda wildcards, input: each("--images", input.images),
        reference=lambda wildcards, input: each("--reference", input.reference),
        prompts=lambda wildcards, input: each("--prompts", input.prompts),
    shell:
        "{HALFTONE} metrics {params.images} {params.reference} {params.prompts} {params.options}"
        " -o {output[0]} &> {log}"


rule summary:
    input:
        expand(METRICS, scenario=ROWS),
    output:
        SUMMARY,
    log:
        "logs/summary.log",
    benchmark:
        "logs/benchmark/summary.tsv"
    threads: THREADS
    params:
        **step("summary"),
    shell:
        "{HALFTONE} summary {input} --timings {TIMINGS} -o {output} &> {log}"


rule report:
    input:
        summary=SUMMARY,
        metrics=expand(METRICS, scenario=ROWS),
        features=expand(FEATURES, scenario=ROWS),
        images=[shard for row in ROWS for shard in outputs(SETTINGS, Step.SAMPLE, row)],
        analyses=expand([PLAN, RANGES], scenario=QUANTIZED),
        artefacts=expand(MANIFEST, scenario=QUANTIZED),
        outliers=analyses(SETTINGS, ROWS),
        prompts=sorted({file for row in ROWS for file in prompts_of(row)}),
    output:
        REPORT,
        GRID,
    log:
        "logs/report.log",
    benchmark:
        "logs/benchmark/report.tsv"
    threads: THREADS
    params:
        **step("report"),
        prompts=lambda wildcards, input: each("--prompts", input.prompts),
    shell:
        "{HALFTONE} report --summary {input.summary} {params.prompts} --grid {output[1]} -o {output[0]} &> {log}"
