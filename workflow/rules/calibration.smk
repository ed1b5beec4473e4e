rule calibration_data:
    input:
        prompts=lambda wildcards: prompt_files(wildcards.model, PromptSet.CALIBRATION),
        model=model_files,
    output:
        CALIBRATION_DATA,
    log:
        "logs/calibration_data/{model}.log",
    benchmark:
        "logs/benchmark/calibration_data/{model}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        **step("calibration_data"),
        prompts=lambda wildcards, input: each("--prompts", input.prompts),
    shell:
        "{HALFTONE} calibration-data {params.options} {params.prompts} -o {output} &> {log}"


# Range moved from activations to weights, for the rows that ask for it.
rule reparameterize:
    input:
        data=data_of,
        model=model_files,
    output:
        factors=REPARAMETERIZE,
        data=IMBALANCE,
        plot=IMBALANCE_PLOT,
    log:
        "logs/reparameterize/{scenario}.log",
    benchmark:
        "logs/benchmark/reparameterize/{scenario}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        **step("reparameterize"),
        folder=REPARAMETERIZE_FOLDER,
    shell:
        "{HALFTONE} reparameterize {params.options} --data {input.data} -o {params.folder} &> {log}"


rule reconstruct:
    input:
        data=data_of,
        factors=factors_of,
        model=model_files,
    output:
        RECONSTRUCT,
    log:
        "logs/reconstruct/{scenario}.log",
    benchmark:
        "logs/benchmark/reconstruct/{scenario}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
        cache_mib=SETTINGS.reconstruction.cache_mib,  # how much is kept in memory changes no result
    params:
        **step("reconstruct"),
        factors=lambda wildcards, input: each("--factors", input.factors),
    shell:
        "{HALFTONE} reconstruct {params.options} --data {input.data} {params.factors} --cache-mib {resources.cache_mib}"
        " --scratch {SCRATCH}/reconstruct/{wildcards.scenario} --shared {UNITS} -o {output} &> {log}"


# Which calls to relax, for the rows that leave that to a measurement (relaxing: auto).
rule sensitivity:
    input:
        data=data_of,
        factors=factors_of,
        weights=weights_of,
        prompts=lambda wildcards: prompt_files(
            SETTINGS.scenarios[wildcards.scenario].model, PromptSet.CALIBRATION
        ),
        model=model_files,
    output:
        data=SENSITIVITY,
        plot=SENSITIVITY_PLOT,
    log:
        "logs/sensitivity/{scenario}.log",
    benchmark:
        "logs/benchmark/sensitivity/{scenario}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        **step("sensitivity"),
        folder=SENSITIVITY_FOLDER,
        factors=lambda wildcards, input: each("--factors", input.factors),
        weights=lambda wildcards, input: (
            f"--weights {input.weights}" if input.weights else ""
        ),
        prompts=lambda wildcards, input: each("--prompts", input.prompts),
    shell:
        "{HALFTONE} sensitivity {params.options} --data {input.data} {params.factors} {params.weights} {params.prompts}"
        " --scratch {SCRATCH}/sensitivity/{wildcards.scenario} -o {params.folder} &> {log}"


rule calibrate:
    input:
        data=data_of,
        factors=factors_of,
        weights=weights_of,
        sensitivity=sensitivity_of,
        model=model_files,
    output:
        CALIBRATE,
    log:
        "logs/calibrate/{scenario}.log",
    benchmark:
        "logs/benchmark/calibrate/{scenario}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
        cache_mib=SETTINGS.reconstruction.cache_mib,
    params:
        **step("calibrate"),
        factors=lambda wildcards, input: each("--factors", input.factors),
        weights=lambda wildcards, input: (
            f"--weights {input.weights}" if input.weights else ""
        ),
        sensitivity=lambda wildcards, input: each("--sensitivity", input.sensitivity),
    shell:
        "{HALFTONE} calibrate {params.options} --data {input.data} {params.factors} {params.weights} {params.sensitivity}"
        " --cache-mib {resources.cache_mib} --scratch {SCRATCH}/calibrate/{wildcards.scenario} -o {output} &> {log}"


rule analyze:
    input:
        CALIBRATE,
    output:
        plan=PLAN,
        statistics=STATISTICS,
        ranges=RANGES,
    log:
        "logs/analyze/{scenario}.log",
    benchmark:
        "logs/benchmark/analyze/{scenario}.tsv"
    threads: THREADS
    params:
        **step("analyze"),
        folder=ANALYSIS,
    shell:
        "{HALFTONE} analyze {input} {params.options} -o {params.folder} &> {log}"
