from halftone.workflow import proxy as card


# Is what the published methods address present in these models? Asked for by name alone: `snakemake proxy`.
rule proxy:
    input:
        expand(card.CARD, model=SETTINGS.models),


rule proxy_card:
    input:
        data=CALIBRATION_DATA,
        prompts=lambda wildcards: prompt_files(wildcards.model, PromptSet.CALIBRATION),
        model=model_files,
    output:
        directory(card.CARD),
    log:
        "logs/proxy/{model}.log",
    benchmark:
        "logs/benchmark/proxy/{model}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        options=lambda wildcards: card.options(SETTINGS, wildcards.model),
        code=sources.verb_hash(ROOT, card.NAME),
        prompts=lambda wildcards, input: each("--prompts", input.prompts),
    shell:
        "{HALFTONE} proxy {params.options} --trajectory {input.data} {params.prompts}"
        " -o {output} &> {log}"


# Where the outliers of activations sit: layer by layer, call by call. `snakemake outliers`, then `snakemake` shows it in
# the report.
rule outliers:
    input:
        expand(card.OUTLIERS_FOLDER + "/outliers.json", model=SETTINGS.models),


rule outlier_analysis:
    input:
        data=CALIBRATION_DATA,
        model=model_files,
    output:
        expand(
            card.OUTLIERS_FOLDER + "/{file}",
            file=["outliers.json", "outliers.svg", "worst.svg"],
            allow_missing=True,
        ),
    log:
        "logs/outliers/{model}.log",
    benchmark:
        "logs/benchmark/outliers/{model}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        options=lambda wildcards: card.options(SETTINGS, wildcards.model),
        code=sources.verb_hash(ROOT, card.OUTLIERS),
        folder=lambda wildcards: card.OUTLIERS_FOLDER.format(model=wildcards.model),
    shell:
        "{HALFTONE} outliers {params.options} --data {input.data} -o {params.folder} &> {log}"
