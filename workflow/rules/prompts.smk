from halftone.workflow import prompt_sources


# Prompts of others (`prompt_sources` in the settings), fetched where a row reads them.
rule fetch_prompts:
    output:
        prompt_sources.FETCHED,
    log:
        "logs/fetch_prompts/{source}.log",
    localrule: True
    params:
        options=lambda wildcards: prompt_sources.options(SETTINGS, wildcards.source),
    shell:
        "{HALFTONE} fetch-prompts {params.options} --cache {SCRATCH}/prompts -o {output} &> {log}"
