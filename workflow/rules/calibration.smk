rule calibration_data:
    input:
        prompts=SETTINGS.prompts["calibration"],
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
    shell:
        "{HALFTONE} calibration-data {params.options} --prompts {input.prompts:q} -o {output} &> {log}"


rule reconstruct:
    input:
        data=data_of,
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
    shell:
        "{HALFTONE} reconstruct {params.options} --data {input.data} --cache-mib {resources.cache_mib}"
        " --scratch {SCRATCH}/reconstruct/{wildcards.scenario} --shared {UNITS} -o {output} &> {log}"


rule calibrate:
    input:
        data=data_of,
        weights=weights_of,
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
        weights=lambda wildcards, input: (
            f"--weights {input.weights}" if input.weights else ""
        ),
    shell:
        "{HALFTONE} calibrate {params.options} --data {input.data} {params.weights}"
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
