"""Top-level fields of requests by route, for the gateway, which imports neither vLLM nor an SDK.

Made by tests/unit/api/test_request_fields.py from vLLM's request models and the typed requests of OpenAI's and Anthropic's SDKs.
"""

from __future__ import annotations

_NAMES = {
    "/v1/completions": """
        add_special_tokens allowed_token_ids bad_words best_of cache_salt ec_transfer_params echo frequency_penalty
        ignore_eos include_stop_str_in_output kv_transfer_params length_penalty logit_bias logprob_token_ids logprobs
        max_tokens min_p min_tokens mm_payload model n presence_penalty priority prompt prompt_cache_key prompt_embeds
        prompt_logprobs repetition_detection repetition_penalty request_id response_format return_mm_kwargs
        return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start safety_identifier
        seed session_id skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval
        stream_options structured_outputs suffix temperature thinking_token_budget timeout top_k top_p
        truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
    """,
    "/v1/chat/completions": """
        add_generation_prompt add_special_tokens allowed_token_ids audio bad_words cache_salt chat_template
        chat_template_kwargs continue_final_message documents ec_transfer_params echo frequency_penalty function_call
        functions ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params length_penalty logit_bias
        logprob_token_ids logprobs max_completion_tokens max_tokens media_io_kwargs messages metadata min_p min_tokens
        mm_payload mm_processor_kwargs modalities model moderation n parallel_tool_calls prediction presence_penalty
        priority prompt_cache_key prompt_cache_options prompt_cache_retention prompt_logprobs reasoning_effort
        repetition_detection repetition_penalty request_id response_format return_mm_kwargs return_prompt_text
        return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start safety_identifier
        seed service_tier session_id skip_special_tokens spaces_between_special_tokens stop stop_token_ids store stream
        stream_interval stream_options structured_outputs temperature thinking_token_budget timeout tool_choice tools
        top_k top_logprobs top_p truncate_prompt_tokens truncation_side use_beam_search user verbosity vllm_xargs
        watermarking web_search_options
    """,
    "/v1/responses": """
        access_programs background cache_salt chat_template_kwargs context_management conversation ec_transfer_params
        enable_response_messages frequency_penalty ignore_eos image include include_reasoning include_stop_str_in_output
        input instructions kv_transfer_params logit_bias max_output_tokens max_tool_calls media_io_kwargs metadata min_p
        mm_payload mm_processor_kwargs model moderation parallel_tool_calls presence_penalty previous_input_messages
        previous_response_id priority prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning
        repetition_penalty request_id return_mm_kwargs safety_identifier seed service_tier session_id
        skip_special_tokens stop stop_token_ids store stream stream_options structured_outputs temperature text timeout
        tool_choice tools top_k top_logprobs top_p truncation user vllm_xargs watermarking
    """,
    "/v1/messages": """
        cache_control cache_salt chat_template_kwargs container diagnostics ec_transfer_params inference_geo
        kv_transfer_params max_tokens messages metadata mm_payload model output_config priority prompt_cache_key
        return_mm_kwargs safety_identifier service_tier speed stop_sequences stream system temperature thinking timeout
        tool_choice tools top_k top_p user user_profile_id vllm_xargs watermarking workspace_id
    """,
    "/v1/messages/count_tokens": """
        cache_control chat_template_kwargs messages model output_config priority prompt_cache_key safety_identifier
        speed system thinking timeout tool_choice tools user user_profile_id workspace_id
    """,
    "/v1/embeddings": """
        add_generation_prompt add_special_tokens cache_salt chat_template chat_template_kwargs continue_final_message
        dimensions embed_dtype encoding_format endianness input media_io_kwargs messages mm_processor_kwargs model
        padding priority prompt_cache_key request_id safety_identifier timeout truncate_prompt_tokens truncation_side
        use_activation user
    """,
    "/v1/score": """
        cache_salt chat_template_kwargs data_1 data_2 documents instruction items max_tokens_per_doc
        max_tokens_per_query mm_processor_kwargs model padding priority prompt_cache_key queries request_id
        safety_identifier text_1 text_2 timeout truncate_prompt_tokens truncation_side use_activation user
    """,
    "/score": """
        cache_salt chat_template_kwargs data_1 data_2 documents instruction items max_tokens_per_doc
        max_tokens_per_query mm_processor_kwargs model padding priority prompt_cache_key queries request_id
        safety_identifier text_1 text_2 timeout truncate_prompt_tokens truncation_side use_activation user
    """,
    "/v1/rerank": """
        cache_salt chat_template_kwargs documents instruction max_tokens_per_doc max_tokens_per_query
        mm_processor_kwargs model padding priority prompt_cache_key query request_id safety_identifier timeout top_n
        truncate_prompt_tokens truncation_side use_activation user
    """,
    "/v2/rerank": """
        cache_salt chat_template_kwargs documents instruction max_tokens_per_doc max_tokens_per_query
        mm_processor_kwargs model padding priority prompt_cache_key query request_id safety_identifier timeout top_n
        truncate_prompt_tokens truncation_side use_activation user
    """,
    "/rerank": """
        cache_salt chat_template_kwargs documents instruction max_tokens_per_doc max_tokens_per_query
        mm_processor_kwargs model padding priority prompt_cache_key query request_id safety_identifier timeout top_n
        truncate_prompt_tokens truncation_side use_activation user
    """,
    "/tokenize": """
        add_generation_prompt add_special_tokens chat_template chat_template_kwargs continue_final_message
        media_io_kwargs messages mm_processor_kwargs model priority prompt prompt_cache_key return_token_strs
        safety_identifier timeout tools user
    """,
    "/detokenize": """
        model priority prompt_cache_key safety_identifier timeout tokens user
    """,
}
REQUEST_FIELDS: dict[str, frozenset[str]] = {route: frozenset(names.split()) for route, names in _NAMES.items()}
"""Route to the names that a request to it may have at its top level."""
